"""How far a learned reward can be trusted: a gold reward, proxies that learned from its choices, and policies that press them.

    python -m experiments.overoptimization --out runs/overoptimization       # after rlhf.py: reads runs/demo/pretrain and sft

Gao et al. 2022 in small, with the ensembles of Coste et al. 2023. The gold reward is an ensemble trained on all of people's
ratings; it stands for people and is never optimised. It chooses between answers of the fine-tuned model, with errors. Proxies
of three sizes (the first layers of the language model) and several seeds learn from these choices alone, all seeds of a size in
one program. Then best-of-n and PPO, with and without its KL penalty, press each proxy, and the gold score is watched against
the square root of the KL.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import held_out, reward_model, stage, tasks
from jaxrlhf.algorithms import best_of_n, ppo
from jaxrlhf.core import masking, sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Prompts, Rollout, SamplingSpec
from jaxrlhf.data import pipeline
from jaxrlhf.data.pipeline import Arrays
from jaxrlhf.evaluation import overoptimization, plots
from jaxrlhf.evaluation import reward_model as judging
from jaxrlhf.models import heads, transformer
from jaxrlhf.rewards import ensemble as ensembles
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import generate, rollout
from jaxrlhf.training import cli, objective, optimizer, step
from jaxrlhf.training.metrics import write_atomic
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    init: Path = Path("runs/demo/pretrain/model")  # language model whose first layers are the proxies' start
    policy: Path = Path("runs/demo/sft/model")  # whose answers are compared, and where every policy starts
    out: Path = Path("runs/overoptimization")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    sampling: stage.Sampling = stage.Sampling(min_tokens=0)
    gold: Path | None = None  # a trained reward model; None: one is trained as `gold_training` says
    gold_training: reward_model.Config = dataclasses.replace(reward_model.Config(), ensemble=4)
    prompts: int = 1024  # answered `responses` times each, for the gold reward to choose from
    responses: int = 2
    choose: Literal["pairs", "best"] = "pairs"  # of every two answers, or the best of all
    noise: float = 0.25  # share of the choices that go wrong
    layers: tuple[int, ...] = (1, 2, 4)  # sizes of the proxies
    proxy_training: reward_model.Config = reward_model.Config(
        steps=60,
        pairs=32,
        ensemble=3,  # seeds of each size
        ensemble_of="models",
        head_init="normal",
        optimizer=dataclasses.replace(reward_model.Config().optimizer, learning_rate=0.002),
    )
    aggregations: tuple[ensembles.Aggregation, ...] = ("mean", "worst", "uncertainty")  # of a size's seeds, pressed as well
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    best_of_prompts: int = 96
    kl_coefs: tuple[float, ...] = (0.0, 0.12)  # of PPO
    pressed: int = 2  # seeds of each size that PPO presses; best-of-n presses all
    iterations: int = 16
    batch: int = 128
    algorithm: ppo.Config = ppo.Config()
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", learning_rate=1e-3, b2=0.98, warmup_fraction=0.1, final_fraction=0.1, clip_norm=1.0
    )
    evaluate_every: int = 4
    held_out_prompts: int = 192

    def __post_init__(self):
        if self.proxy_training.ensemble < 2 or self.proxy_training.ensemble_of != "models":
            raise ValueError("proxy_training must be an ensemble of 2 or more models: they are the seeds of a size")
        if not 1 <= self.pressed <= self.proxy_training.ensemble:
            raise ValueError(f"pressed={self.pressed} must be between 1 and the {self.proxy_training.ensemble} seeds of a size")
        if not 0 <= self.noise < 0.5:
            raise ValueError(f"noise={self.noise} must be in [0, 0.5); at 0.5 the choices say nothing")
        if self.responses < 2:
            raise ValueError(f"responses={self.responses}: there is nothing to choose from; take 2 or more")


@dataclasses.dataclass(frozen=True)
class Lab:
    """What all measurements share."""

    policy: stage.Trained
    trunk: stage.Trained
    gold: Callable[[Rollout], jax.Array]
    spec: SamplingSpec
    mesh: jax.sharding.Mesh


@dataclasses.dataclass(frozen=True)
class Target:
    """What PPO presses: a seed (its number) or an aggregation of all seeds, of one size, with one KL coefficient."""

    layers: int
    proxy: str
    kl_coef: float


def run(config: Config) -> dict[str, Any]:
    """Write the curves and their fits to `result.json` in `config.out`, and `plots/*.svg`."""
    with Run.open(config.out, config, tensorboard=False) as run:
        if run.result is not None:
            return run.result
        mesh = sharding.make_mesh(config.mesh)
        gold = config.gold or train_gold(config)
        with jax.set_mesh(mesh):
            judged, policy = stage.load(gold, mesh, "reward_model"), stage.load(config.policy, mesh)
            reward = stage.reward(judged)
            spec = stage.spec(config.sampling, policy.tokenizer)
            lab = Lab(policy, stage.load(config.init, mesh), lambda rows: reward(judged.params, rows), spec, mesh)
            sets, reference = choices(config, lab)
            proxies = {layers: proxy(config, lab, sets, reference, layers) for layers in config.layers}
            best = choose_best(config, lab, proxies)
            pressed = [row for coef in config.kl_coefs for row in press(config, lab, proxies, coef)]
        result = {
            "proxies": [{"layers": n, "parameters": _size(judged.params["trunk"]["layers"])} for n, judged in proxies.items()],
            "best_of_n": best,
            "ppo": pressed,
            "fits": fits(best, pressed),
        }
        draw(config.out / "plots", best, pressed)
        return run.done(result)


def _size(layers: Any) -> int:
    """Parameters of one member's layers: the embedding table is the same for all sizes."""
    return sum(leaf[0].size for leaf in jax.tree.leaves(layers))


def train_gold(config: Config) -> Path:
    """The folder of the gold reward, trained where it is not there yet."""
    shared = {"init": config.init, "reference": config.policy, "sampling": config.sampling, "mesh": config.mesh}
    settings = dataclasses.replace(config.gold_training, out=config.out / "gold", seed=config.seed, **shared)
    reward_model.run(settings)
    return settings.out / "model"


def choices(config: Config, lab: Lab) -> tuple[Arrays, dict[str, np.ndarray]]:
    """Sets of answers with the gold reward's choices (fields of `reward.Batch`), and the answers as rows to normalise on."""
    size = min(config.batch, config.prompts)
    prompts, key, found = tasks.review_prompts(lab.policy.tokenizer, size, config.seed), jax.random.key(config.seed), []
    for i in range(-(-config.prompts // size)):
        drawn = generate.generate(
            lab.policy.model, lab.policy.params, sharding.shard_batch(prompts[i], lab.mesh), lab.spec, key, config.responses
        )
        found.append(jax.device_get((drawn.tokens, drawn.prompt_len, drawn.response_len, lab.gold(drawn))))
    rows = dict(
        zip(("tokens", "prompt_len", "response_len", "gold"), map(np.concatenate, zip(*found, strict=True)), strict=True)
    )
    sets = {name: array.reshape(-1, config.responses, *array.shape[1:]) for name, array in rows.items()}
    gold = sets.pop("gold")
    chosen = {"preferred": chosen_pairs(gold, config.noise, config.seed)}
    if config.choose == "best":
        chosen = {"preferred": np.zeros_like(chosen["preferred"]), "best": chosen_best(gold, config.noise, config.seed)}
    return sets | chosen, {"tokens": rows["tokens"], "length": rows["prompt_len"] + rows["response_len"]}


def chosen_pairs(gold: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """[S, N, N]: 1 where answer i was chosen over j. Equal scores are no choice; a share `noise` is turned round."""
    sets, n = gold.shape
    lead = gold[:, :, None] - gold[:, None, :]
    wrong = np.triu(np.random.default_rng([seed, 1]).random((sets, n, n)) < noise, 1)
    wrong = wrong | wrong.swapaxes(1, 2)
    return (np.where(wrong, -lead, lead) > 0).astype(np.float32)


def chosen_best(gold: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """[S]: the answer of the highest score, in a share `noise` one of the others."""
    random = np.random.default_rng([seed, 2])
    sets, n = gold.shape
    other = random.integers(1, n, sets)
    return ((gold.argmax(1) + np.where(random.random(sets) < noise, other, 0)) % n).astype(np.int32)


def proxy(config: Config, lab: Lab, sets: Arrays, reference: dict[str, np.ndarray], layers: int) -> stage.Trained:
    """All seeds of the proxy of that many layers, each normalised on the reference policy's answers."""
    folder = config.out / f"proxy_{layers}"
    settings = dataclasses.replace(config.proxy_training, out=folder, seed=config.seed)
    with Run.open(folder, settings) as run:
        if run.result is None:
            shape = dataclasses.replace(lab.trunk.config, layers=layers)
            if layers > lab.trunk.config.layers:
                raise ValueError(f"layers={layers}: the language model in {config.init} has {lab.trunk.config.layers}")
            trunk = lab.trunk.params | {"layers": jax.tree.map(lambda w: w[:layers], lab.trunk.params["layers"])}

            def ordered(seed: int) -> Any:
                return pipeline.batches(sets, settings.pairs, seed)

            several = ensembles.Config(settings.ensemble, "models")
            data = reward_model.of_members(several, ordered, config.seed)
            params = reward_model.train(run, settings, shape, reward_model.fresh(settings, shape, trunk, lab.mesh), data)
            params = rewards.with_scale(params)
            raw = reward_model.score_texts(settings, transformer.build(shape), params, reference)
            params = rewards.normalise(params, jnp.asarray(raw))
            reward_model.save(folder / "model", settings, params, shape, lab.trunk.tokenizer)
            run.done({})
    return stage.load(folder / "model", lab.mesh, "reward_model")


def choose_best(config: Config, lab: Lab, proxies: Mapping[int, stage.Trained], prompts: int = 16) -> list[dict[str, Any]]:
    """Best-of-n by every seed and aggregation of every size: its curve, and how it orders a prompt's samples."""
    every, most = held_out.prompts(lab.policy.tokenizer, config.best_of_prompts), max(config.best_of)
    score = {n: reward_model.scores_of(config.proxy_training, judged.model) for n, judged in proxies.items()}
    gold: list[np.ndarray] = []
    scores: dict[int, list[np.ndarray]] = {n: [] for n in proxies}
    for start in range(0, config.best_of_prompts, prompts):
        few = pipeline.take_prompts(every, slice(start, start + prompts))
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        few = sharding.shard_batch(few, lab.mesh)
        drawn = generate.generate(lab.policy.model, lab.policy.params, few, lab.spec, key, most)
        gold.append(np.asarray(lab.gold(drawn)))
        for n, judged in proxies.items():
            scores[n].append(np.asarray(score[n](judged.params, drawn.tokens, drawn.prompt_len + drawn.response_len)))
    judged_gold = np.concatenate(gold).reshape(-1, most)
    rows = []
    for n in proxies:
        own = np.concatenate(scores[n], axis=1)
        for name, values in named(config, own).items():
            values = values.reshape(-1, most)
            curve = overoptimization.curve(best_of_n.table(values, {"gold": judged_gold}, config.best_of))
            rows.append({"layers": n, "proxy": name, "agreement": judging.agreement(values, judged_gold), "rows": curve})
    return rows


def named(config: Config, scores: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [M, n] by what presses them: each seed, and each aggregation of the seeds."""
    found = {str(m): own for m, own in enumerate(scores)}
    for name in config.aggregations:
        found[name] = np.asarray(ensembles.aggregate(jnp.asarray(scores), aggregated(config, name)))
    return found


def aggregated(config: Config, name: ensembles.Aggregation) -> ensembles.Config:
    """The seeds of a size as an ensemble."""
    return ensembles.Config(config.proxy_training.ensemble, "models", name, config.proxy_training.uncertainty_coef)


def press(config: Config, lab: Lab, proxies: Mapping[int, stage.Trained], kl_coef: float) -> list[dict[str, Any]]:
    """PPO against `config.pressed` seeds of every size, and against every aggregation of the largest."""
    optimise, rows = trainer(config, lab, kl_coef), []
    for n, judged in proxies.items():
        pooling = judged.settings["pooling"]
        alone = rewards.reward(judged.model, pooling)
        against: dict[str, tuple[Callable, Any]] = {
            str(m): (alone, ensembles.member(judged.params, m, aggregated(config, "mean"))) for m in range(config.pressed)
        }
        if n == max(proxies):
            for name in config.aggregations:
                against[name] = (ensembles.reward(judged.model, pooling, aggregated(config, name)), judged.params)
        for name, (reward, params) in against.items():
            target = Target(n, name, kl_coef)
            with Run.open(config.out / "ppo" / f"{n}_{name}_{kl_coef:g}", target, tensorboard=False) as run:
                if run.result is None:
                    run.done({"rows": overoptimization.curve(optimise(lambda rows, r=reward, p=params: r(p, rows)))})
                rows.append({**dataclasses.asdict(target), "rows": (run.result or {})["rows"]})
    return rows


def trainer(config: Config, lab: Lab, kl_coef: float) -> Callable[[Callable[[Rollout], jax.Array]], list[dict[str, Any]]]:
    """(reward) -> the course of PPO from the fine-tuned model against it; compiled once for all rewards."""
    settings, start = dataclasses.replace(config.algorithm, kl_coef=kl_coef), lab.policy
    value = sharding.init_params(heads.value_specs(start.config.width), jax.random.key(config.seed))
    params = {"policy": start.params, "value": jax.device_put(value, sharding.replicated(lab.mesh))}
    frozen = {"reference": start.params}
    update = optimizer.make(config.optimizer, config.iterations * settings.epochs * settings.minibatches, params)
    outputs = objective.make_outputs(start.model, lab.spec, values=True, trunk="policy")
    run_epochs = step.make_epochs(outputs, ppo.loss, settings, update, settings.epochs, settings.minibatches)
    prepare = jax.jit(ppo.prepare, static_argnames="config")
    prompts = tasks.review_prompts(start.tokenizer, config.batch, config.seed)
    judged = sharding.shard_batch(held_out.prompts(start.tokenizer, config.held_out_prompts), lab.mesh)

    def optimise(reward: Callable[[Rollout], jax.Array]) -> list[dict[str, Any]]:
        keys = jax.random.split(jax.random.key(config.seed))
        state = step.init_state(params, update, keys[0], ppo.init(settings))
        rows = []
        for i in range(config.iterations):
            if i % config.evaluate_every == 0:
                rows.append({"step": i, **measure(lab, judged, state.params["policy"], reward)})
            batch = sharding.shard_batch(prompts[i], lab.mesh)
            drawn = rollout.collect(
                start.model, state.params, frozen, batch, lab.spec, jax.random.fold_in(keys[1], i), version=i
            )
            drawn = dataclasses.replace(drawn, score=reward(drawn.rollout))
            ready, algorithm, _ = prepare(drawn, state.algorithm, config=settings)
            state, _ = run_epochs(dataclasses.replace(state, algorithm=algorithm), frozen, ready)
        return [*rows, {"step": config.iterations, **measure(lab, judged, state.params["policy"], reward)}]

    return optimise


def measure(lab: Lab, prompts: Prompts, params: Any, reward: Callable[[Rollout], jax.Array]) -> dict[str, float]:
    """Mean KL to the fine-tuned model (nats a response), proxy, gold and length of one answer to each held-out prompt."""
    drawn = generate.generate(lab.policy.model, params, prompts, lab.spec, jax.random.key(0))
    ours, theirs = (rollout.score_rollout(lab.policy.model, of, drawn, lab.spec)[0] for of in (params, lab.policy.params))
    mask = masking.response_mask(drawn.response_len, ours.shape[1])
    return {
        "kl": float(masking.masked(ours - theirs, mask).sum(1).mean()),
        "proxy": float(reward(drawn).mean()),
        "gold": float(lab.gold(drawn).mean()),
        "length": float(drawn.response_len.mean()),
    }


def fits(best: Sequence[Mapping[str, Any]], pressed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The forms of Gao et al. 2022 fitted to the gold score of each size: all seeds together, and each aggregation."""
    groups: dict[tuple, list[Any]] = {}
    for row in [*best, *pressed]:
        seeds = "seeds" if row["proxy"].isdigit() else row["proxy"]
        groups.setdefault((row["layers"], seeds, row.get("kl_coef")), []).append(row["rows"])
    found = []
    for (layers, name, kl_coef), curves in groups.items():
        fitted = overoptimization.fit_curves(curves, best_of_n=kl_coef is None)
        how = {"method": "best_of_n"} if kl_coef is None else {"method": "ppo", "kl_coef": kl_coef}
        if fitted is not None:
            found.append({**how, "layers": layers, "proxy": name, **fitted._asdict()})
    return found


def draw(folder: Path, best: Sequence[Mapping[str, Any]], pressed: Sequence[Mapping[str, Any]]) -> None:
    """Gold score (marks) and proxy score (faint) against the distance, the mean over the seeds of each size."""
    folder.mkdir(exist_ok=True)
    figures = {"best_of_n": ("Best of n", best)}
    for coef in dict.fromkeys(row["kl_coef"] for row in pressed):
        figures[f"ppo_{coef:g}"] = (f"PPO, KL coefficient {coef:g}", [row for row in pressed if row["kl_coef"] == coef])
    for name, (title, rows) in figures.items():
        series = []
        for colour, layers in enumerate(dict.fromkeys(row["layers"] for row in rows)):
            seeds = [row["rows"] for row in rows if row["layers"] == layers and row["proxy"].isdigit()]
            x, gold, score = (
                np.mean([[p[key] for p in one] for one in seeds], 0).tolist() for key in ("sqrt_kl", "gold", "proxy")
            )
            series += [
                plots.Series(f"{layers} layers", x, gold, colour % 4, marks=True),
                plots.Series(f"{layers} layers, proxy", x, score, colour % 4, faint=True),
            ]
        chart = plots.lines(f"{title}: gold score, and (faint) the proxy's", series, "√KL to the fine-tuned model")
        write_atomic(folder / f"{name}.svg", plots.alone(chart))


def _smoke() -> Config:
    small = reward_model.PRESETS["smoke"]
    return Config(
        gold_training=dataclasses.replace(small, steps=8, ensemble=2),
        prompts=32,
        layers=(1, 2),
        proxy_training=dataclasses.replace(Config().proxy_training, steps=6, pairs=8, ensemble=2),
        aggregations=("worst",),
        best_of=(1, 2, 4, 8),
        best_of_prompts=16,
        kl_coefs=(0.0,),
        iterations=4,
        batch=16,
        evaluate_every=1,
        held_out_prompts=16,
    )


PRESETS = {"default": Config(), "smoke": _smoke()}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
