"""One update: the language-model step of pre-training and fine-tuning, and the reward model's, beside eager torch.

    python benchmarks/train_step.py --shape small --task sft --torch PYTHON      # a Python with torch and transformers
    python benchmarks/train_step.py --shape tiny --task reward --torch PYTHON

What bounds it: on a CPU the weight products, forward once and backward twice (three times forward where layers are
recomputed), at the machine's rate for such products, measured in the same run in both libraries: beside the ratio stands the
share that each side reaches, and the most that a float32 step with our products could reach ("bound by products"). Both start
from the same weights, which ours writes as a checkpoint that transformers loads, and train on the same rows with AdamW and a
clipped gradient; the losses of all steps must agree before anything is reported. The contenders run alternately. The last
line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generate as shapes
import jax
import jax.numpy as jnp
import measure
import numpy as np

from jaxrlhf.algorithms import lm, reward
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models import hf, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import cli, objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig

VARIANTS = {"jaxrlhf": shapes.UNROLLED, "jaxrlhf, layers recomputed in a scan": {"scan": True, "remat": "layers"}}
UPDATE = OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_fraction=0.0, b1=0.9, b2=0.95, clip_norm=1.0)


def main() -> None:
    """Time all contenders in turn and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="small")
    parser.add_argument("--task", choices=("sft", "reward"), default="sft")
    parser.add_argument("--rows", type=int, default=8, help="texts, or pairs of texts")
    parser.add_argument("--width", type=int, default=128, help="tokens of a text")
    parser.add_argument("--torch", type=Path, help="a Python that has torch and transformers")
    parser.add_argument("--repeats", type=int, default=6, help="even, so that every second round runs backwards")
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    measure.write(measure.head("train_step", vars(config)) | compare(config), config.result)


def compare(config: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of an update by each contender, from the same weights on the same rows."""
    _, shape = shapes.model_of(config.shape, config.width)
    params = initial(shape)
    shape_of_rows = (config.rows, config.width) if config.task == "sft" else (config.rows, 2, config.width)
    tokens = np.random.default_rng(0).integers(3, shape.vocab_size, shape_of_rows, dtype=np.int32)
    products = products_of(shape, tokens.size, heads=config.task == "sft")
    own = measure.rates(products)
    losses: dict[str, list[float]] = {}
    cases: dict[str, Callable[[], Any]] = {}
    cli.keep_memory()  # as every script of ours does
    for name, changes in VARIANTS.items():
        wanted = dataclasses.replace(shape, **changes)
        cases[name] = ours(wanted, params, tokens, config.task, losses.setdefault(name, []))
        narrow = dataclasses.replace(wanted, dtype="bfloat16")
        cases[name + ", bfloat16 products"] = ours(narrow, params, tokens, config.task, [])
    with tempfile.TemporaryDirectory() as folder:
        peers = {}
        if config.torch:
            given = written(Path(folder), shape, params, tokens)
            settings = given | {"task": config.task, "learning_rate": UPDATE.learning_rate, "products": products}
            peers["torch"] = measure.Peer("torch_train", config.torch, settings)
            cases["torch"] = lambda: measure.times(peers["torch"].run(), losses.setdefault("torch", []))
        results = measure.alternate(cases, config.repeats)
        for peer in peers.values():
            peer.close()
    apart = {name: max_apart(found, losses["jaxrlhf"]) for name, found in losses.items()}
    if max(apart.values()) > 2e-3:
        raise SystemExit(f"losses of the steps are apart by {apart}: not the same work")
    for result in results.values():
        result["tokens_per_s"] = 1e3 * tokens.size / result["median_ms"]
    found = measure.against(results, products, own, {name: peer.about for name, peer in peers.items()})
    measure.tell(results, found)
    return {
        "model": dataclasses.asdict(shape),
        "peers": {name: peer.about for name, peer in peers.items()},
        "losses_apart": apart,
        "updates": {name: len(found) for name, found in losses.items()},
        "equal_work": dict.fromkeys(peers, "jaxrlhf"),
        "results": results,
        **found,
    }


def products_of(shape: TransformerConfig, tokens: int, heads: bool) -> measure.Products:
    """What an update asks of weight products, forward once and backward twice; attention is left out."""
    layer = 4 * shape.width**2 + 3 * shape.width * shape.mlp_width
    found = {"layers": {"shape": [tokens, shape.width, shape.mlp_width], "flops": 6 * tokens * shape.layers * layer}}
    if heads:
        found["heads"] = {
            "shape": [tokens, shape.width, shape.vocab_size],
            "flops": 6 * tokens * shape.vocab_size * shape.width,
        }
    return found


def initial(shape: TransformerConfig) -> dict[str, Any]:
    """Weights of a reward model, whose trunk is the language model."""
    trunk = transformer.build(shape).init(jax.random.key(0))
    weight = jax.random.normal(jax.random.key(1), (shape.width,)) / np.sqrt(shape.width + 1)
    return {"trunk": trunk, "head": {"weight": weight, "bias": jnp.zeros([])}}


def ours(shape: TransformerConfig, params: Any, tokens: np.ndarray, task: str, losses: list[float]) -> Callable[[], Any]:
    """An update of ours at each call."""
    model = transformer.build(shape)
    if task == "sft":
        outputs, loss, settings, name = objective.make_outputs(model, packed=True), lm.loss, lm.Config(), "loss/lm"
        params, batch = params["trunk"], lm.packed(tokens)
    else:
        outputs = objective.make_outputs(model, logprobs=False, scores="last", trunk="trunk")
        loss, settings, name = reward.loss, reward.Config(centre_coef=0.0), "loss/pairs"
        batch = pairs(tokens)
    update = optimizer.make(UPDATE, 1000, params)
    train_step = step.make_train_step(outputs, loss, settings, update)
    held = [step.init_state(params, update, jax.random.key(0))]

    def call() -> jax.Array:
        held[0], metrics = train_step(held[0], None, batch)
        losses.append(float(metrics[name]))
        return held[0].step

    return call


def pairs(tokens: np.ndarray) -> reward.Batch:
    """Rows [pairs, 2, T], the first of each preferred; the score is read at the last token."""
    count, _, width = tokens.shape
    preferred = jnp.zeros((count, 2, 2)).at[:, 0, 1].set(1)
    ones = jnp.ones((count, 2), jnp.int32)
    return reward.Batch(jnp.asarray(tokens), ones, ones * (width - 1), preferred)


def written(folder: Path, shape: TransformerConfig, params: Any, tokens: np.ndarray) -> dict[str, str]:
    """The model as a checkpoint for transformers, and the rows."""
    tokenizer = tokenizers.train(["a film that is good, and one that is bad"], 280)
    reward_model = tokens.ndim == 3
    one = {"gain": jnp.ones([]), "bias": jnp.zeros([])}
    hf.save(folder / "model", jax.device_get(params | one if reward_model else params["trunk"]), shape, tokenizer)
    np.savez(folder / "batch.npz", tokens=tokens)
    return {"folder": str(folder / "model"), "batch": str(folder / "batch.npz")}


def max_apart(found: list[float], other: list[float]) -> float:
    """The largest relative difference of the losses of one step."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, other, strict=True))


if __name__ == "__main__":
    main()
