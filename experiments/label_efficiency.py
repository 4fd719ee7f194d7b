"""How many labels it takes to reach an accuracy, by which pairs people are asked about: random, uncertain, disputed ones.

    python -m experiments.label_efficiency --out runs/label_efficiency     # after rlhf.py: the language model of runs/demo

Pairs of people's rated texts, of which a simulated person is asked about some at a time. After each batch of labels several
linear rewards on the language model's hidden states (its trunk stays as it is), each on a bootstrap of the labels, are fitted
anew; they choose the next batch, and are judged together on the held-out texts that people rated. Every way of choosing begins
with the same labels, from the same pool, and is judged by the same kind of model: the curves differ by what was asked alone.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from experiments import stage
from jaxrlhf.core import masking, processes
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import comparisons, human_sentiment, pipeline
from jaxrlhf.data.human_sentiment import DOMAINS, Rating
from jaxrlhf.evaluation import plots, reward_model
from jaxrlhf.feedback import labelers, selection, store
from jaxrlhf.training import cli
from jaxrlhf.training.metrics import write_atomic
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    init: Path = Path("runs/demo/pretrain/model")  # language model whose hidden states the rewards are linear in
    out: Path = Path("runs/label_efficiency")
    mesh: MeshConfig = MeshConfig()
    seeds: tuple[int, ...] = (1, 2, 3)  # of pool, first labels, bootstraps and the person
    ways: tuple[selection.Way, ...] = ("random", "uncertainty", "disagreement", "bald")
    pool: int = 2000  # pairs that may be asked about
    first: int = 40  # labels of pairs drawn at random, which every way begins with
    batch: int = 20  # labels from one fit to the next
    labels: int = 600  # in all
    members: int = 8  # rewards that may disagree
    ridge: float = 1.0  # of each fit: the prior's precision, in the unit of standardised features / sqrt(their number)
    person: labelers.Person = labelers.Person()  # prefers the text that people rated higher, with these faults
    width: int = 64  # tokens of a text

    def __post_init__(self):
        if "random" not in self.ways:
            raise ValueError(f"ways={self.ways}: 'random' must be among them, the others are compared with it")
        if not 0 < self.first < self.labels <= self.pool or (self.labels - self.first) % self.batch:
            raise ValueError(
                f"first={self.first}, batch={self.batch}, labels={self.labels}, pool={self.pool}: labels from first to at most "
                "pool, in whole batches"
            )
        if self.members < 2 or self.ridge <= 0 or len(self.seeds) < 2:
            raise ValueError(f"members={self.members} and {len(self.seeds)} seeds: 2 or more; ridge={self.ridge}: above 0")


@dataclasses.dataclass(frozen=True)
class Texts:
    """Rated texts as the rewards see them."""

    features: Float[np.ndarray, "n d"]
    rating: Float[np.ndarray, " n"]
    domain: list[str]
    text: list[str]


def run(config: Config) -> dict[str, Any]:
    """Write the curves to `result.json` in `config.out`, and `plots/label_efficiency.svg`."""
    with Run.open(config.out, config, tensorboard=False) as run:
        if run.result is not None:
            return run.result
        mesh = stage.mesh(config.mesh)
        with jax.set_mesh(mesh):
            trunk = stage.load(config.init, mesh)
            train, test = (seen(trunk, human_sentiment.load(split), config.width) for split in ("train", "test"))
        centre, scale = train.features.mean(0), train.features.std(0) * np.sqrt(train.features.shape[1])
        train, test = (dataclasses.replace(x, features=(x.features - centre) / scale) for x in (train, test))
        labels = np.arange(config.first, config.labels + 1, config.batch)
        curves: dict[str, list[list[float]]] = {way: [] for way in config.ways}
        for seed in config.seeds:
            for way in config.ways:
                curves[way].append(curve(config, train, test, way, seed))
            shown = "  ".join(f"{way} {found[-1][-1]:.3f}" for way, found in curves.items())
            print(f"seed {seed}: accuracy with {labels[-1]} labels: {shown}", flush=True)
        result = {"labels": labels.tolist(), "accuracy": curves, "compared": compared(labels, curves)}
        (config.out / "plots").mkdir(exist_ok=True)
        write_atomic(config.out / "plots" / "label_efficiency.svg", figure(labels, curves))
        return run.done(result)


def seen(trunk: stage.Trained, ratings: Sequence[Rating], width: int, size: int = 128) -> Texts:
    """Each text with the mean of its hidden states, which a reward model of pooling='mean' has under its head."""
    rows = comparisons.rated_rows(ratings, trunk.tokenizer, width)

    @jax.jit
    def pooled(params: Any, tokens: jax.Array, length: jax.Array) -> jax.Array:
        hidden = trunk.model.hidden(params, tokens).astype(jnp.float32)
        mask = masking.length_mask(length, tokens.shape[1])[..., None]
        return jnp.where(mask, hidden, 0.0).sum(axis=1) / length[:, None]

    count = len(ratings)
    tokens, length = (np.resize(rows[x], (-(-count // size) * size, *rows[x].shape[1:])) for x in ("tokens", "length"))
    parts = [pooled(trunk.params, tokens[i : i + size], length[i : i + size]) for i in range(0, len(length), size)]
    found = np.concatenate(processes.to_host(parts))[:count].astype(np.float64)
    texts = [pipeline.clean(rating.text) for rating in ratings]
    return Texts(found, rows["rating"].astype(np.float64), [rating.domain for rating in ratings], texts)


def pool(config: Config, train: Texts, seed: int) -> Int[np.ndarray, "n 2"]:
    """Pairs of texts of one domain, no text twice: what may be asked about, in random order."""
    rng, parts = np.random.default_rng([seed, 1]), []
    for domain in DOMAINS:
        inside = rng.permutation(np.flatnonzero(np.array(train.domain) == domain))
        parts.append(inside[: len(inside) // 2 * 2].reshape(-1, 2))
    every = np.concatenate(parts)
    if len(every) < config.pool:
        raise ValueError(f"pool={config.pool}: {len(every)} pairs can be made of the rated texts; take fewer")
    return every[rng.permutation(len(every))[: config.pool]]


def asked(config: Config, train: Texts, pairs: Int[np.ndarray, "n 2"], seed: int) -> Float[np.ndarray, " n"]:
    """What the simulated person says of each pair: 1 the first text, 0 the second, 0.5 a tie.

    A person with drift is asked about the pool in its order, whichever part of it is then used.
    """
    rating = dict(zip(train.text, train.rating, strict=True))
    shown = [store.Pair(str(number), train.text[i], train.text[j]) for number, (i, j) in enumerate(pairs.tolist())]

    def taste(texts: Sequence[str]) -> np.ndarray:
        del texts
        return np.array([rating[text] for pair in shown for text in (pair.response_a, pair.response_b)])

    said = labelers.simulated(shown, taste, "simulated", config.person, seed)
    return np.array([{"a": 1.0, "b": 0.0, None: 0.5}[choice.preferred] for choice in said])


def fit(
    gap: Float[np.ndarray, "n d"], label: Float[np.ndarray, " n"], copies: Float[np.ndarray, "m n"], ridge: float
) -> Float[np.ndarray, "m d"]:
    """Linear rewards under which sigmoid(gap @ w) is the probability of the label, each on its own copies of the choices.

    Source: Bradley and Terry 1952; by Newton's method, as logistic regression without an offset, so that sides are alike.
    """
    found = np.zeros((len(copies), gap.shape[1]))
    for m, times in enumerate(copies):
        kept = times > 0
        x, y, c, w = gap[kept], label[kept], times[kept], found[m]
        for _ in range(30):
            p = selection.chances((x @ w)[None])[0]
            slope = x.T @ (c * (y - p)) - ridge * w
            step = np.linalg.solve((x.T * (c * p * (1 - p))) @ x + ridge * np.eye(len(w)), slope)
            w = w + step
            if np.abs(step).max() < 1e-6:
                break
        found[m] = w
    return found


def curve(config: Config, train: Texts, test: Texts, way: selection.Way, seed: int) -> list[float]:
    """Held-out accuracy after the first labels and after each batch: mean over the domains."""
    pairs = pool(config, train, seed)
    said, gap = asked(config, train, pairs, seed), train.features[pairs[:, 0]] - train.features[pairs[:, 1]]
    taken, accuracy = list(range(config.first)), []  # the pool is in random order
    # A pair's copies in each bootstrap are its own, whenever it is labelled: Poisson, as in `comparisons.bootstrapped_sets`.
    copies = np.random.default_rng([seed, 2]).poisson(1.0, (config.members, len(pairs))).astype(np.float64)
    for number in range((config.labels - config.first) // config.batch + 1):
        heads = fit(gap[taken], said[taken], copies[:, taken], config.ridge)
        scores = (test.features @ heads.T).mean(axis=1)
        found = reward_model.pair_accuracy(scores, test.rating, test.domain)
        accuracy.append(float(np.mean([each.accuracy for each in found.values()])))
        left = np.setdiff1d(np.arange(len(pairs)), taken)
        if len(taken) < config.labels:
            draw = zlib.crc32(f"{seed} {number}".encode())
            value = selection.worth(heads @ gap[left].T, way, draw)
            best = selection.order(value, [str(i) for i in left])  # every pair is a prompt of its own
            taken += left[best[: config.batch]].tolist()
    return accuracy


def compared(labels: Int[np.ndarray, " k"], curves: Mapping[str, Sequence[Sequence[float]]]) -> list[dict[str, Any]]:
    """Of each way: mean accuracy at the end, the mean over the curve, and the share of random's labels that it needs, with its
    interval; None: more than there are.
    """

    def share(rows: np.ndarray, at: int) -> dict[str, float | None]:
        needed = selection.share_needed(labels, rows, found["random"], at)._asdict()
        return {name: value if np.isfinite(value) else None for name, value in needed.items()}

    found = {way: np.array(rows, np.float64) for way, rows in curves.items()}
    quarters = [len(labels) // 4, len(labels) // 2, 3 * len(labels) // 4, len(labels) - 1]
    return [
        {
            "way": way,
            "last": float(rows[:, -1].mean()),
            "mean": float(rows.mean()),
            "better_seeds": int((rows.mean(axis=1) > found["random"].mean(axis=1)).sum()),  # by the mean over the curve
            "share_needed": {str(labels[at]): share(rows, at) for at in quarters},
        }
        for way, rows in found.items()
    ]


def figure(labels: Int[np.ndarray, " k"], curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """SVG: held-out accuracy against labels, the mean over the seeds."""
    series = [
        plots.Series(way, labels.tolist(), np.mean(rows, axis=0).tolist(), colour % 4)
        for colour, (way, rows) in enumerate(curves.items())
    ]
    return plots.alone(plots.lines("Accuracy on held-out pairs", series, "labels"))


SMOKE = Config(seeds=(1, 2), pool=120, first=20, batch=20, labels=60, members=3)
PRESETS = {"default": Config(), "smoke": SMOKE}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
