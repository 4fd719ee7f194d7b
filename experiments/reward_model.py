"""Stage 3: a reward model from people's ratings, and later from people's choices as well.

    python -m experiments.reward_model --init runs/demo/pretrain/model --out runs/demo/reward_model

The language model's trunk with a linear head on the mean of its hidden states. Each batch is a set of rated texts; every pair
of one domain whose mean ratings differ by half a point or more is a choice that people made (Bradley-Terry over some thousand
pairs for the price of 64 forward passes). With `--choices` (a feedback store, a .jsonl file or a TFDS folder), pairs of answers
join each set with equal total weight, and training starts from `--refresh`, an earlier reward model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import preference_data, stage
from jaxrlhf.algorithms import reward as algorithm
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import comparisons, human_sentiment, pipeline
from jaxrlhf.data.human_sentiment import DOMAINS
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.evaluation import judges, reward_model
from jaxrlhf.models import heads, transformer
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import generate
from jaxrlhf.training import cli, objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run

JUDGED_WIDTH = 64  # tokens of a held-out text


@dataclasses.dataclass(frozen=True)
class Config:
    init: Path = Path("runs/demo/pretrain/model")  # language model whose trunk is the start
    refresh: Path | None = None  # a reward model to start from instead
    reference: Path = Path("runs/demo/sft/model")  # policy on whose samples the score gets mean 0 and deviation 1
    choices: Path | None = None  # choices between answers: feedback store, .jsonl file or TFDS folder
    out: Path = Path("runs/demo/reward_model")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    steps: int = 380
    texts: int = 64  # rated texts a set
    pairs: int = 32  # chosen pairs a set, where there are choices
    held_out_pairs: float = 0.15  # of the choices
    width: int = 64  # tokens of a text to learn from; longer ones are cut
    widths: int = 4  # row widths to compile for
    dropout: float = 0.15
    pooling: rewards.Pooling = "mean"
    algorithm: algorithm.Config = algorithm.Config()
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


def run(config: Config) -> dict[str, Any]:
    """Train, and write `model/` and `result.json` into `config.out`."""
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        mesh = sharding.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            trunk, params = initial(config, mesh)
            data, held_out = dataset(config, trunk.tokenizer)
            before = choice_accuracy(config, trunk, rewards.with_scale(params), held_out) if held_out else None
            model_config = dataclasses.replace(trunk.config, dropout=config.dropout)
            model = transformer.build(model_config)
            update = optimizer.make(config.optimizer, config.steps, params)
            # A generator for dropout: the default one costs a CPU as much as the layers.
            key = jax.random.key(config.seed, impl="rbg")
            state = run.restore(step.init_state(params, update, key))
            outputs = objective.make_outputs(
                model, logprobs=False, scores=config.pooling, trunk="trunk", dropout=config.dropout > 0
            )
            train_step = step.make_train_step(outputs, algorithm.loss, config.algorithm, update)
            for i in run.steps(run.start, config.steps, "reward model", show=("reward/accuracy",)):
                state, metrics = train_step(state, None, algorithm.Batch(**data[i]))
                run.log(i, metrics)
                run.maybe_save(i, state)

            params = normalised(config, trunk, rewards.with_scale(state.params), mesh)
            result = evaluate(config, trunk, params)
            if held_out:
                accuracy = choice_accuracy(config, trunk, params, held_out)
                result["choices"] = {"held_out": len(held_out), "accuracy": accuracy, "accuracy_before": before}
        stage.save(
            config.out / "model", "reward_model", jax.device_get(params), trunk.config, trunk.tokenizer, pooling=config.pooling
        )
        return run.done(result)


def initial(config: Config, mesh: jax.sharding.Mesh) -> tuple[stage.Trained, dict[str, Any]]:
    """The model, and {trunk, head} to train: the language model with a new head, or an earlier reward model."""
    if config.refresh is not None:
        start = stage.load(config.refresh, mesh, "reward_model")
        return start, {"trunk": start.params["trunk"], "head": start.params["head"]}
    start = stage.load(config.init, mesh)
    # A head of zeros, as a new direction of the trained features would only add noise to them at first.
    head = sharding.init_params(heads.value_specs(start.config.width), jax.random.key(config.seed))
    return start, {"trunk": start.params, "head": jax.device_put(head, sharding.replicated(mesh))}


def dataset(config: Config, tokenizer: Tokenizer) -> tuple[Any, list[dict[str, Any]]]:
    """`dataset[step]`: a set of rated texts, with chosen pairs where there are any; and the pairs that are held out."""
    rated = comparisons.rated_rows(human_sentiment.load("train"), tokenizer, config.width)
    widths = comparisons.choose_widths(rated["length"], config.texts, count=config.widths)
    if config.choices is None:
        return comparisons.rated_sets(rated, config.texts, config.seed, widths), []
    rows = comparisons.fitting(preference_data.read(config.choices), tokenizer, config.width)
    if len(rows) < config.pairs:
        raise ValueError(f"{config.choices}: {len(rows)} choices, but a set takes {config.pairs}: make more with label.py")
    order = np.random.default_rng(config.seed).permutation(len(rows))
    cut = int(len(rows) * config.held_out_pairs)
    held_out, train = ([rows[i] for i in part] for part in (order[:cut], order[cut:]))
    pairs = comparisons.preference_rows(train, tokenizer, config.width)
    return comparisons.compared_sets(rated, pairs, (config.texts, config.pairs), config.seed, widths), held_out


def normalised(config: Config, trunk: stage.Trained, params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Scores of the reference policy's own samples get mean 0 and deviation 1."""
    policy = stage.load(config.reference, mesh)
    rows = policy.tokenizer.encode_batch([pipeline.clean(r.text) for r in human_sentiment.reviews("train")])
    prompts = pipeline.cut_prompts(rows, policy.tokenizer, config.seed)
    prompts = next(iter(pipeline.prompt_batches(prompts, config.reference_samples, config.seed)))
    spec = stage.spec(config.sampling, policy.tokenizer)
    rollout = generate.generate(
        policy.model, policy.params, sharding.shard_batch(prompts, mesh), spec, jax.random.key(config.seed)
    )
    scores = rewards.reward(trunk.model, config.pooling)(params, rollout)
    return rewards.normalise(params, scores)


def score_texts(model: Any, params: Any, rows: dict[str, np.ndarray], pooling: rewards.Pooling, size: int = 256) -> np.ndarray:
    """Score of each row."""
    fn = jax.jit(lambda p, tokens, length: rewards.score(model, p, tokens, length, pooling))
    height = len(rows["length"])
    whole = -(-height // size) * size
    tokens, length = (np.resize(rows[name], (whole, *rows[name].shape[1:])) for name in ("tokens", "length"))
    return np.concatenate([fn(params, tokens[i : i + size], length[i : i + size]) for i in range(0, whole, size)])[:height]


def evaluate(config: Config, trunk: stage.Trained, params: Any) -> dict[str, Any]:
    """Accuracy on held-out pairs of people's ratings, beside VADER's and a bag-of-words ridge's fitted on the same texts."""
    train, test = human_sentiment.load("train"), human_sentiment.load("test")
    texts, means, domains = [pipeline.clean(r.text) for r in test], np.array([r.mean for r in test]), [r.domain for r in test]
    ridge = judges.fit_ridge([pipeline.clean(r.text) for r in train], [r.mean for r in train])
    rows = comparisons.rated_rows(test, trunk.tokenizer, JUDGED_WIDTH)
    scores = score_texts(trunk.model, params, rows, config.pooling)

    def accuracy(scores: np.ndarray) -> dict[str, float]:
        return {d: a.accuracy for d, a in reward_model.pair_accuracy(scores, means, domains).items()}

    both = scores / scores.std() + (ridge.predict(texts) - means.mean()) / ridge.predict(texts).std()
    error, table = reward_model.calibration(scores, means, domains)
    return {
        "accuracy": {
            "model": accuracy(scores),
            "ridge": accuracy(ridge.predict(texts)),
            "vader": accuracy(judges.vader(texts)),
            "model_and_ridge": accuracy(both),
        },
        "calibration": {"ece": error, "table": table},
        "domains": list(DOMAINS),
    }


def choice_accuracy(config: Config, trunk: stage.Trained, params: Any, rows: list[dict[str, Any]]) -> float:
    """Share of held-out choices in which the chosen answer scores higher."""
    pairs = comparisons.preference_rows(rows, trunk.tokenizer, JUDGED_WIDTH)
    tokens = np.asarray(pairs.tokens).reshape(-1, JUDGED_WIDTH)
    length = np.asarray(pairs.prompt_len + pairs.response_len).reshape(-1)
    scores = score_texts(trunk.model, params, {"tokens": tokens, "length": length}, config.pooling).reshape(-1, 2)
    return float((scores[:, 0] > scores[:, 1]).mean())


PRESETS = {"default": Config(), "smoke": Config(steps=40, texts=32, reference_samples=64, width=48, widths=1)}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
