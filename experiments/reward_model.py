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
import jax.numpy as jnp
import numpy as np

from experiments import preference_data, stage
from jaxrlhf.algorithms import pairwise, reward
from jaxrlhf.core import members, processes, sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Prompts
from jaxrlhf.data import comparisons, human_sentiment, pipeline
from jaxrlhf.data.human_sentiment import DOMAINS
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.evaluation import judges, reward_model
from jaxrlhf.models import heads, lora, pretrained, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.rewards import ensemble as ensembles
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import generate
from jaxrlhf.training import cli, objective, optimizer, plan, step, timing
from jaxrlhf.training.flops import Pass
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run

JUDGED_WIDTH = 64  # tokens of a held-out text


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
    mesh = stage.mesh(config.mesh, reference_samples=config.reference_samples)
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        with jax.set_mesh(mesh):
            trunk, base, params = initial(config, mesh)
            data, held_out = dataset(config, trunk.tokenizer, run=run)
            data = pipeline.within(data, trunk.config.vocab_size)
            before = choice_accuracy(config, trunk, whole(config, base, params), held_out) if held_out else None
            learned = config.algorithm
            if config.debias_length:
                learned = dataclasses.replace(learned, length_coef=length_coef(config, trunk.tokenizer, run))
            params = train(run, dataclasses.replace(config, algorithm=learned), trunk.config, params, data, base)
            learnt = params["trunk"]
            params = normalised(config, trunk, whole(config, base, params), mesh)
            result = evaluate(config, trunk, params)
            if config.debias_length:
                result["length_coef"] = learned.length_coef
            if held_out:
                accuracy = choice_accuracy(config, trunk, params, held_out)
                result["choices"] = {"held_out": len(held_out), "accuracy": accuracy, "accuracy_before": before}
        save(config.out / "model", config, params, trunk.config, trunk.tokenizer)
        if config.lora.rank:
            save_adapter(config.out / "adapter", config, params | {"trunk": learnt}, base, trunk)
        return run.done(result)


def train(run: Run, config: Config, shape: TransformerConfig, params: Any, data: Any, base: Any = None) -> Any:
    """`config.steps` updates of {trunk, head}, or of an ensemble of them, from where `run` left off.

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
        batch = reward.Batch(**data[i])
        state, metrics = train_step(state, {"base": base}, batch)
        run.log(i, {name: x.mean() if x.ndim else x for name, x in metrics.items()}, batch)  # the members' mean
        run.maybe_save(i, state)
    return step.served(state)


def single(params: Any, kind: ensembles.Of | None) -> Any:
    """What one member would train alone: names and ranks of it decide who updates what."""
    if kind in ("adapters", "models"):
        return members.one(params, 0)
    return params if kind is None else params | {"head": members.one(params["head"], 0)}


def whole(config: Config, base: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Reward parameters as they are scored with and saved: an adapter merged with the base; several beside it."""
    if config.several is not None and config.several.of == "adapters":
        return rewards.with_scale({"trunk": base, "adapters": params["trunk"], "head": params["head"]})
    return rewards.with_scale(params | {"trunk": lora.merge(base, params["trunk"], config.lora)})


def initial(config: Config, mesh: jax.sharding.Mesh) -> tuple[stage.Trained, Any, dict[str, Any]]:
    """The model, its trunk, and {trunk, head} to train: the language model with a new head, or an earlier reward model."""
    if config.refresh is not None:
        return refreshed(config, config.refresh, mesh)
    start = stage.load(config.init, mesh)
    return start, start.params, fresh(config, start.config, start.params, mesh)


def refreshed(config: Config, folder: Path, mesh: jax.sharding.Mesh) -> tuple[stage.Trained, Any, dict[str, Any]]:
    """The same of an earlier reward model; of one that was saved as an adapter, over `init` again."""
    if stage.kind(folder) == "reward_adapter":
        start = stage.load_reward(folder, mesh, stage.load(config.init, mesh))
    else:
        start = stage.load(folder, mesh, "reward_model")
    several, earlier, over = config.several, stage.ensembled(start.settings), stage.adapted(start.settings)
    kinds = [None if x is None else (x.members, x.of, x.lora) for x in (earlier, several)]
    if kinds[0] != kinds[1] or (over.rank and over != config.lora):
        held = "one reward model" if earlier is None else f"{earlier.members} {earlier.of}"
        own = over if earlier is None or over.rank else earlier.lora
        held += f" of {own}" if own.rank else ""
        raise ValueError(
            f"{folder} holds {held}, but ensemble={config.ensemble} of {config.ensemble_of} with {config.lora} is "
            "asked for: refresh it as what it is"
        )
    base, adapters = start.params["trunk"], start.params.get("adapters")
    if over.rank:
        base, adapters = lora.detach(base, over)
    trunk = own_trunk(config, start.config, base, mesh) if adapters is None else adapters
    return start, base, {"trunk": trunk, "head": start.params["head"]}


def fresh(config: Config, shape: TransformerConfig, trunk: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """{trunk, head} to train: the language model or an adapter with a new head; of an ensemble as many of either as it has."""
    several = config.several
    # A head of zeros, as a new direction of the trained features would only add noise to them at first.
    specs = heads.value_specs(shape.width) if config.head_init == "zeros" else heads.score_specs(shape.width)
    key = jax.random.key(config.seed)
    if several is None:
        head = jax.device_put(sharding.init_params(specs, key), sharding.replicated(mesh))
        return {"trunk": own_trunk(config, shape, trunk, mesh), "head": head}
    own = members.stack([sharding.init_params(specs, jax.random.fold_in(key, m)) for m in range(several.members)])
    if several.of == "adapters":
        apart = [stage.adapter(shape, config.lora, mesh, config.seed + 1000 * m) for m in range(several.members)]
        params = {"adapters": members.stack(apart), "head": own}
    else:
        copies = several.of == "models"
        params = {"trunk": members.stack([trunk] * several.members) if copies else trunk, "head": own}
    placed = stage.specs(shape, "reward_model", several)
    params = jax.device_put(params, sharding.shardings({name: placed[name] for name in params}, mesh))
    found = params["adapters"] if several.of == "adapters" else own_trunk(config, shape, params["trunk"], mesh)
    return {"trunk": found, "head": params["head"]}


def own_trunk(config: Config, shape: TransformerConfig, trunk: Any, mesh: jax.sharding.Mesh) -> Any:
    """What is trained of one trunk: all of it, or an adapter over it."""
    return stage.adapter(shape, config.lora, mesh, config.seed) if config.lora.rank else trunk


def dataset(config: Config, tokenizer: Tokenizer, window: int = 12, run: Run | None = None) -> tuple[Any, list[dict[str, Any]]]:
    """`dataset[step]`: a set of rated texts, with chosen pairs where there are any; and the pairs that are held out."""
    ratings = [rating for rating in human_sentiment.load("train") if rating.domain in config.domains]
    if not ratings:
        raise ValueError(f"domains={config.domains}: no ratings; choose from {', '.join(DOMAINS)}")
    rated = comparisons.rated_rows(ratings, tokenizer, config.width)
    widths = comparisons.choose_widths(rated["length"], config.texts, count=config.widths)
    pairs, held_out = None, []
    if config.choices is not None:
        pairs, held_out = chosen_pairs(config, config.choices, tokenizer, run)

    def sets(seed: int) -> Any:
        if pairs is None:
            return comparisons.rated_sets(rated, config.texts, seed, widths, window)
        size = (config.texts, config.pairs)
        return comparisons.compared_sets(rated, pairs, size, seed, widths, window, ties=config.algorithm.ties != "half")

    if config.several is not None:
        return of_members(config.several, sets, config.seed), held_out
    return sets(config.seed), held_out


def of_members(several: ensembles.Config, sets: Callable[[int], Any], seed: int) -> Any:
    """The data of an ensemble from `sets(seed)`: an order for each model or adapter, or a bootstrap for each head."""
    if several.of != "heads":
        return comparisons.stacked_sets([sets(seed + 1000 * m) for m in range(several.members)])
    return comparisons.bootstrapped_sets(sets(seed), several.members, seed)


def chosen_pairs(
    config: Config, choices: Path, tokenizer: Tokenizer, run: Run | None = None
) -> tuple[Any, list[dict[str, Any]]]:
    """The choices to learn from, and those held out."""
    found = preference_data.read(choices, config.algorithm.ties != "half", run, config.skip_bad)
    rows = comparisons.fitting(found, tokenizer, config.width)
    if len(rows) < config.pairs:
        raise ValueError(f"{choices}: {len(rows)} choices, but a set takes {config.pairs}: make more with label.py")
    order = np.random.default_rng(config.seed).permutation(len(rows))
    cut = int(len(rows) * config.held_out_pairs)
    held_out, train = ([rows[i] for i in part] for part in (order[:cut], order[cut:]))
    return comparisons.preference_rows(train, tokenizer, config.width), [dict(row) for row in held_out if not row["tie"]]


def length_coef(config: Config, tokenizer: Tokenizer, run: Run | None = None, sets: int = 40) -> float:
    """What length alone is worth in the choices of some sets; those to learn from are of nearly equal length each."""
    data, _ = dataset(dataclasses.replace(config, ensemble=1), tokenizer, 1, run)
    seen = [data[i] for i in range(sets)]
    preferred, length = (np.concatenate([one[name] for one in seen]) for name in ("preferred", "response_len"))
    return pairwise.fit_length(preferred, length)


def scores_of(config: Config, model: Any) -> Callable[[Any, Any, Any], jax.Array]:
    """(params, tokens, length) -> [B], of an ensemble every member's [M, B]; compiled."""
    several = config.several
    if several is None:
        return jax.jit(lambda params, tokens, length: rewards.score(model, params, tokens, length, config.pooling))
    return jax.jit(lambda params, tokens, length: ensembles.scores(model, params, tokens, length, config.pooling, several))


def normalised(config: Config, trunk: stage.Trained, params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Scores of the reference policy's own samples get mean 0 and deviation 1, or those of demonstrations mean 0."""
    policy = stage.load(config.reference, mesh)
    rows = policy.tokenizer.encode_batch([pipeline.clean(r.text) for r in human_sentiment.reviews("train")])
    if config.normalise == "demonstrations":
        shown = pipeline.continuation_rows(rows, bos=policy.tokenizer.bos, eos=policy.tokenizer.eos)
        few = np.random.default_rng(config.seed).permutation(len(shown["tokens"]))[: config.reference_samples]
        return centred(config, trunk.model, params, {name: array[few] for name, array in shown.items()})
    prompts = pipeline.cut_prompts(rows, policy.tokenizer, config.seed)
    prompts = next(iter(pipeline.prompt_batches(prompts, config.reference_samples, config.seed)))
    return scaled(config, trunk.model, params, policy, prompts, mesh)


def centred(config: Config, model: Any, params: Any, shown: dict[str, np.ndarray]) -> Any:
    """Scores of demonstrations (tokens, prompt_len, response_len) get mean 0."""
    length = shown["prompt_len"] + shown["response_len"]
    return rewards.centre(params, scores_of(config, model)(params, shown["tokens"], length))


def scaled(config: Config, model: Any, params: Any, policy: stage.Trained, prompts: Prompts, mesh: jax.sharding.Mesh) -> Any:
    """Scores of a policy's answers get mean 0 and deviation 1."""
    spec, key = stage.spec(config.sampling, policy.tokenizer), jax.random.key(config.seed)
    drawn = generate.generate(policy.model, policy.params, sharding.shard_batch(prompts, mesh), spec, key)
    scores = scores_of(config, model)(params, drawn.tokens, drawn.prompt_len + drawn.response_len)
    return rewards.normalise(params, processes.to_host(scores))


def score_texts(config: Config, model: Any, params: Any, rows: dict[str, np.ndarray], size: int = 256) -> np.ndarray:
    """Score of each row; of an ensemble, every member's [M, n]."""
    fn = scores_of(config, model)
    height = len(rows["length"])
    whole = -(-height // size) * size
    tokens, length = (np.resize(rows[name], (whole, *rows[name].shape[1:])) for name in ("tokens", "length"))
    found = [fn(params, tokens[i : i + size], length[i : i + size]) for i in range(0, whole, size)]
    return np.concatenate(processes.to_host(found), axis=-1)[..., :height]


def together(config: Config, scores: np.ndarray) -> np.ndarray:
    """One score a row, whether one model gave it or several."""
    return scores if config.several is None else np.asarray(ensembles.aggregate(jnp.asarray(scores), config.several))


def evaluate(config: Config, trunk: stage.Trained, params: Any) -> dict[str, Any]:
    """Accuracy on held-out pairs of people's ratings, beside VADER's and a bag-of-words ridge's fitted on the same texts."""
    train, test = human_sentiment.load("train"), human_sentiment.load("test")
    if config.held_out_texts is not None:
        test = [test[i] for i in np.random.default_rng(0).permutation(len(test))[: config.held_out_texts]]
    texts, means, domains = [pipeline.clean(r.text) for r in test], np.array([r.mean for r in test]), [r.domain for r in test]
    ridge = judges.fit_ridge([pipeline.clean(r.text) for r in train], [r.mean for r in train])
    rows = comparisons.rated_rows(test, trunk.tokenizer, JUDGED_WIDTH)
    every = score_texts(config, trunk.model, params, rows)
    scores = together(config, every)

    def accuracy(scores: np.ndarray) -> dict[str, float]:
        return {d: a.accuracy for d, a in reward_model.pair_accuracy(scores, means, domains).items()}

    both = scores / scores.std() + (ridge.predict(texts) - means.mean()) / ridge.predict(texts).std()
    error, table = reward_model.calibration(scores, means, domains)
    result = {
        "accuracy": {
            "model": accuracy(scores),
            "ridge": accuracy(ridge.predict(texts)),
            "vader": accuracy(judges.vader(texts)),
            "model_and_ridge": accuracy(both),
        },
        "accuracy_by_margin": reward_model.accuracy_by_margin(scores, means, domains),
        "calibration": {"ece": error, "table": table},
        "length_correlation": {
            "score": reward_model.correlation(scores, rows["length"]),
            "rating": reward_model.correlation(means, rows["length"]),
        },
        "domains": list(DOMAINS),
    }
    if config.several is not None:
        result["members"] = [accuracy(own) for own in every]
    return result


def choice_accuracy(config: Config, trunk: stage.Trained, params: Any, rows: list[dict[str, Any]]) -> float:
    """Share of held-out choices in which the chosen answer scores higher."""
    pairs = comparisons.preference_rows(rows, trunk.tokenizer, JUDGED_WIDTH)
    tokens = np.asarray(pairs.tokens).reshape(-1, JUDGED_WIDTH)
    length = np.asarray(pairs.prompt_len + pairs.response_len).reshape(-1)
    scores = together(config, score_texts(config, trunk.model, params, {"tokens": tokens, "length": length})).reshape(-1, 2)
    return float((scores[:, 0] > scores[:, 1]).mean())


def save(folder: Path, config: Config, params: Any, shape: TransformerConfig, tokenizer: Tokenizer) -> None:
    """Write the reward model, or the ensemble of them, for the stages that read it."""
    stage.save(folder, "reward_model", params, shape, tokenizer, **notes(config))


def save_adapter(folder: Path, config: Config, params: Any, base: Any, start: stage.Trained) -> None:
    """Write what was trained without the base under it: for stages that hold that base already (`stage.load_reward`)."""
    of_members = config.several is not None and config.several.of == "adapters"
    own = {"adapters" if of_members else "adapter": params["trunk"]} | {x: params[x] for x in ("head", "gain", "bias")}
    told = notes(config) | ({} if of_members else {"lora": dataclasses.asdict(config.lora)})
    over_init = config.refresh is None or stage.kind(config.refresh) == "reward_adapter"
    folder_of_base = config.init if over_init else config.refresh
    told["base"] = {"folder": str(folder_of_base), "blake2b": pretrained.fingerprint(base)}
    stage.save(folder, "reward_adapter", own, start.config, start.tokenizer, **told)


def notes(config: Config) -> dict[str, Any]:
    """What a reader of the reward model must know beside its shape."""
    told: dict[str, Any] = {"pooling": config.pooling}
    return told if config.several is None else told | {"ensemble": dataclasses.asdict(config.several)}


PRESETS = {"default": Config(), "smoke": Config(steps=40, texts=32, reference_samples=64, width=48, widths=1)}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="init")
