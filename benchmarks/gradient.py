"""The gradient of the language-model loss: the transformer's, and the same written plainly and left to autodiff and XLA.

    python benchmarks/gradient.py --batch 32 --width 64

What bounds it: on a CPU the weight products, at the rate of one large product with bfloat16 operands; the rest (norms, softmax,
attention of short rows, the copies that XLA adds) is what `models/products.py`, `models/attention.py` and `models/heads.py`
work on. Rows are packed from short texts. Both must give the same loss and nearly the same gradient before either is timed;
then they run alternately.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import alternate, commit

from jaxrlhf.models import heads, rotary, transformer
from jaxrlhf.models.config import TransformerConfig


def main() -> None:
    """Run the comparison and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=9)
    settings = parser.parse_args()
    config = TransformerConfig(
        settings.vocab, 192, layers=4, heads=4, kv_heads=4, head_width=48, mlp_width=512, max_length=128, dtype=settings.dtype
    )
    params = transformer.build(config).init(jax.random.key(0))
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(3, settings.vocab, (settings.batch, settings.width), dtype=np.int32))
    segments = jnp.asarray(1 + np.cumsum(random.random(tokens.shape) < 1 / 16, axis=1), jnp.int32)
    data = (params, tokens, segments)
    cases = {"plain": jax.jit(jax.value_and_grad(plain(config))), "ours": jax.jit(jax.value_and_grad(ours(config)))}
    agree(cases, data)
    results = alternate({name: lambda run=run: run(*data) for name, run in cases.items()}, settings.repeats)
    rate = product_rate(settings.dtype, settings.repeats)
    weights = sum(x.size for x in jax.tree.leaves(params["layers"])) + settings.vocab * config.width
    for name, result in results.items():
        result["tokens_per_s"] = 1e3 * tokens.size / result["median_ms"]
        result["share_of_product_rate"] = 6 * tokens.size * weights / rate / (1e-3 * result["median_ms"])
        memory = cases[name].lower(*data).compile().memory_analysis()
        result["temporary_mb"] = getattr(memory, "temp_size_in_bytes", 0) / 1e6
        print(f"{name}: {result['median_ms']:.0f} ms, {result['processor_median_ms']:.0f} ms of processor time")
    report = {
        "benchmark": "gradient",
        "settings": vars(settings),
        "model": dataclasses.asdict(config) | {"parameters": weights},
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "commit": commit(),
        "product_flop_per_s": rate,
        "results": results,
        "ratio": results["plain"]["median_ms"] / results["ours"]["median_ms"],
        "processor_ratio": results["plain"]["processor_median_ms"] / results["ours"]["processor_median_ms"],
    }
    print(json.dumps(report))


def ours(config: TransformerConfig) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """Mean negative log-likelihood by the library."""
    model = transformer.build(config)

    def loss(params, tokens, segments):
        states = model.hidden(params, tokens, segments)[:, :-1]
        return -heads.token_logprobs(model, params, states, tokens[:, 1:])[0].mean()

    return loss


def plain(config: TransformerConfig) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """The same, flattened, scanned and rematerialised, but with every gradient as autodiff derives it."""

    def product(x, weight):
        narrow = x.reshape(-1, x.shape[-1]).astype(config.dtype), weight.astype(config.dtype)
        return jnp.matmul(*narrow, preferred_element_type=jnp.float32).reshape(*x.shape[:-1], -1)

    def norm(x, weights):
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_epsilon) * weights["scale"]

    def loss(params, tokens, segments):
        rotation = rotary.of_layer(rotary.rotations(config, transformer.segment_positions(segments)), None)
        visible = jnp.tril(segments[:, :, None] == segments[:, None, :])[:, None]

        def layer(x, w):
            y = norm(x, w["attention_norm"])
            q, k, v = (product(y, w[name]).reshape(*y.shape[:2], -1, config.head_width) for name in ("query", "key", "value"))
            q, k = (rotary.rotate(z, rotation) for z in (q, k))
            mixed = jax.nn.dot_product_attention(q, k, v, mask=visible, implementation="xla")
            x = x + product(mixed.reshape(x.shape), w["output"])
            y = norm(x, w["mlp_norm"])
            return x + product(jax.nn.silu(product(y, w["gate"])) * product(y, w["up"]), w["down"]), None

        x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), params["embed"][tokens], params["layers"])
        logprobs = jax.nn.log_softmax(product(norm(x, params["norm"])[:, :-1], params["embed"].T))
        return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()

    return loss


def agree(cases: dict[str, Callable], data: tuple) -> None:
    """Stop unless both do the same work: equal losses, gradients of one direction."""
    (a, slope_a), (b, slope_b) = (run(*data) for run in cases.values())
    cosines = jax.tree.map(lambda x, y: float((x * y).sum() / jnp.linalg.norm(x) / jnp.linalg.norm(y)), slope_a, slope_b)
    if abs(a - b) > 1e-3 * abs(a) or min(jax.tree.leaves(cosines)) < 0.99:
        raise SystemExit(f"losses {a} and {b}, cosines of the gradients {cosines}: nothing to compare")


def product_rate(dtype: str, repeats: int) -> float:
    """FLOP a second of one large product with operands of this type."""
    x = jnp.ones((2048, 2048), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    timed = alternate({"product": lambda: product(x)}, repeats)
    return 2 * 2048**3 / (1e-3 * timed["product"]["min_ms"])


if __name__ == "__main__":
    main()
