"""Stage 3: a reward model from people's ratings, and later from people's choices as well.

    python -m experiments.reward_model --init runs/demo/pretrain/model --out runs/demo/reward_model
    python -m experiments.reward_model --ensemble 4 --ensemble-of heads --aggregation worst --out runs/demo/ensemble
    python -m experiments.reward_model --ensemble 4 --ensemble-of adapters --lora.rank 8 --out runs/demo/adapters
    python -m experiments.reward_model --init runs/demo/sft/model --lora.rank 8    # adapter/: PPO lays it over its own start

The language model's trunk with a linear head on the mean of its hidden states. Each batch is a set of rated texts; every pair
of one domain whose mean ratings differ by half a point or more is a choice that people made (Bradley-Terry over some thousand
pairs for the price of 64 forward passes). With `--choices` (a feedback store, a .jsonl file or a TFDS folder), pairs of answers
join each set with equal total weight, and training starts from `--refresh`, an earlier reward model. An ensemble's heads learn
from a bootstrap each, its models and adapters from an order each, in one program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

from experiments import best, reward_data, reward_params, reward_scores, stage
from jaxrlhf.algorithms import reward
from jaxrlhf.core import members
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import pipeline
from jaxrlhf.data.human_sentiment import DOMAINS
from jaxrlhf.models import lora, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.rewards import ensemble as ensembles
from jaxrlhf.rewards import model as rewards
from jaxrlhf.training import cli, objective, optimizer, plan, step, timing
from jaxrlhf.training.flops import Pass
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    init: Path = Path("runs/demo/pretrain/model")  # language model whose trunk is the start
    refresh: Path | None = None  # a reward model to start from instead; of one that is an adapter, `init` is the base
    reference: Path = Path("runs/demo/sft/model")  # policy on whose samples the score gets mean 0 and deviation 1
    choices: Path | None = None  # choices between answers: feedback store, .jsonl or .parquet file or TFDS folder
    skip_bad: bool = False  # leave bad lines of a .jsonl file out, count them and name them in rejects.jsonl; else refuse it
    out: Path = Path("runs/demo/reward_model")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    steps: int = 380
    domains: tuple[str, ...] = DOMAINS  # whose ratings are learned
    texts: int = 64  # rated texts a set
    pairs: int = 32  # chosen pairs a set, where there are choices
    held_out_pairs: float = 0.15  # of the choices
    width: int = 64  # tokens of a text to learn from; longer ones are cut
    widths: int = 4  # row widths to compile for
    dropout: float = 0.15
    pooling: rewards.Pooling = "mean"
    head_init: Literal["zeros", "normal"] = "zeros"  # normal: of deviation 1 / sqrt(D + 1), as the literature has it
    debias_length: bool = False  # fit algorithm.length_coef to the choices first, so that the score need not pay for length
    normalise: Literal["samples", "demonstrations"] = "samples"  # mean 0, deviation 1 on the reference's samples; or mean 0
    lora: LoraConfig = LoraConfig()  # with a rank > 0: train an adapter over the frozen trunk, or an ensemble of them
    ensemble: int = 1  # heads, adapters or models; 1: a single reward model
    ensemble_of: ensembles.Of = "heads"  # on one trunk, over which adapters lie; or whole models
    aggregation: ensembles.Aggregation = "mean"  # how a policy is scored by an ensemble
    uncertainty_coef: float = 0.5  # of the members' variance, for aggregation='uncertainty'
    algorithm: reward.Config = reward.Config()
    optimizer: OptimizerConfig = OptimizerConfig(
        name="muon",
        muon_dtype="bfloat16",
        learning_rate=0.005,
        adam_learning_rate=1e-3,
        head_scale=2.0,
        warmup_fraction=0.1,
        clip_norm=None,
    )
    sampling: stage.Sampling = stage.Sampling()
    reference_samples: int = 512
    held_out_texts: int | None = None  # rated texts to measure accuracy on; None: all 2,775
    evaluate_every: int = 0  # steps; also before the first and after the last. 0: after the last alone
    keep: best.Keep = "last"  # written as model/: the last weights, or the best that was measured (accuracy on held-out texts)
    watch: timing.Options = timing.Options()  # wait for each stage, profile steps, refuse to compile after warm-up

    @property
    def several(self) -> ensembles.Config | None:
        """The ensemble, if it is one."""
        if self.ensemble == 1:
            return None
        own = lora.NONE if self.ensemble_of == "heads" else self.lora  # heads may share one adapter
        return ensembles.Config(self.ensemble, self.ensemble_of, self.aggregation, self.uncertainty_coef, own)


def run(config: Config) -> dict[str, Any]:
    """Train, and write `model/` and `result.json` into `config.out`."""
    best.check(config.keep, config.evaluate_every)
    mesh = stage.mesh(config.mesh, reference_samples=config.reference_samples)
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        with jax.set_mesh(mesh):
            trunk, base, params = reward_params.initial(config, mesh)
            data, held_out = reward_data.dataset(config, trunk.tokenizer, run=run)
            data = pipeline.within(data, trunk.config.vocab_size)
            before = None
            if held_out:
                before = reward_scores.choice_accuracy(config, trunk, reward_params.whole(config, base, params), held_out)
            learned = config.algorithm
            if config.debias_length:
                learned = dataclasses.replace(learned, length_coef=reward_data.length_coef(config, trunk.tokenizer, run))
            judge = None
            if config.evaluate_every:
                judge = run.clock.timed("evaluate", reward_scores.judge(config, trunk, base))
            params = train(run, dataclasses.replace(config, algorithm=learned), trunk.config, params, data, base, judge)
            if judge is not None:
                last = config.steps, config.evaluate_every, reward_scores.ACCURACY, params, judge, config.keep
                params, _ = best.finish(run, *last)
            learnt = params["trunk"]
            params = reward_scores.normalised(config, trunk, reward_params.whole(config, base, params), mesh)
            result = reward_scores.evaluate(config, trunk, params)
            if config.debias_length:
                result["length_coef"] = learned.length_coef
            if held_out:
                accuracy = reward_scores.choice_accuracy(config, trunk, params, held_out)
                result["choices"] = {"held_out": len(held_out), "accuracy": accuracy, "accuracy_before": before}
        reward_params.save(config.out / "model", config, params, trunk.config, trunk.tokenizer)
        if config.lora.rank:
            reward_params.save_adapter(config.out / "adapter", config, params | {"trunk": learnt}, base, trunk)
        return run.done(result)


def train(
    run: Run,
    config: Config,
    shape: TransformerConfig,
    params: Any,
    data: Any,
    base: Any = None,
    judge: Callable[[Any], best.Judgement] | None = None,
) -> Any:
    """`config.steps` updates of {trunk, head}, or of an ensemble of them, from where `run` left off; with a `judge` measured
    as `config.evaluate_every` says.

    `base` is what adapters lie over.
    """
    several = config.several
    kind = None if several is None else several.of
    update = optimizer.make(config.optimizer, config.steps, single(params, kind))
    if kind in ("adapters", "models"):
        update = optimizer.of_members(update)
    stage.tell_memory(run, plan.training(params, update) + plan.frozen({"base": base}))
    # A generator for dropout: the default one costs a CPU as much as the layers.
    key = jax.random.key(config.seed, impl="rbg")
    state = run.restore(step.init_state(params, update, key))
    model = transformer.build(dataclasses.replace(shape, dropout=config.dropout))
    outputs = objective.make_outputs(
        model,
        logprobs=False,
        scores=config.pooling,
        trunk="trunk",
        dropout=config.dropout > 0,
        members=kind,
        adapters=config.lora,
    )
    train_step = step.make_train_step(outputs, reward.loss, config.algorithm, update)
    train_step = run.clock.learner(train_step, Pass(shape, gradient=True, logits=False, lora=config.lora))
    data = stage.timed(run.clock, data)
    for i in run.steps(run.start, config.steps, "reward model", show=("reward/accuracy",)):
        now = config.evaluate_every, reward_scores.ACCURACY, step.served(state)
        judged = {} if judge is None else best.judged(run, i, *now, judge)
        batch = reward.Batch(**data[i])
        state, metrics = train_step(state, {"base": base}, batch)
        run.log(i, judged | {name: x.mean() if x.ndim else x for name, x in metrics.items()}, batch)  # the members' mean
        run.maybe_save(i, state)
    return step.served(state)


def single(params: Any, kind: ensembles.Of | None) -> Any:
    """What one member would train alone: names and ranks of it decide who updates what."""
    if kind in ("adapters", "models"):
        return members.one(params, 0)
    return params if kind is None else params | {"head": members.one(params["head"], 0)}


PRESETS = {"default": Config(), "smoke": Config(steps=40, texts=32, reference_samples=64, width=48, widths=1)}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="init")
