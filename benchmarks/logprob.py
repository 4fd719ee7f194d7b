"""Log-probs and entropies of tokens over a large vocabulary, forward and gradient: by blocks as the library does, and plainly.

    python benchmarks/logprob.py                       # 4096 tokens, width 512, vocabulary 32,768
    python benchmarks/logprob.py --target h100         # compiled for one, memory alone; see benchmarks/targets.py

What bounds it: two products with the head, [T, D] x [D, V], forward, one of them again in the backward pass where the logits
are not kept, and two more for the gradients: at the machine's product rate the blocks take 8/6 of what keeping all logits
takes. What they save is memory: a block of logits in place of [T, V] three times over (logits, probabilities, gradient). Both
must give the same numbers and gradients before either is timed; then they run alternately. The last line of stdout is one
JSON document.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import targets
from peers import jax_products

from jaxrlhf.models import heads, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import plan


def main() -> None:
    """Compare both and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--positions", type=int, default=128)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the products' operands")
    parser.add_argument("--no-entropy", action="store_true")
    parser.add_argument("--target", choices=("cpu", "h100"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    measure.write(measure.head("logprob", vars(config)) | compare(config), config.result)


def compare(config: argparse.Namespace) -> dict[str, Any]:
    """Temporaries and milliseconds of both, and how far their gradients are apart."""
    shape = TransformerConfig(
        config.vocab, config.width, 1, 4, 4, config.width // 4, 4 * config.width, 8, tied_head=False, dtype=config.dtype
    )
    model, keys = transformer.build(shape), jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (config.rows, config.positions, config.width))
    tokens = jax.random.randint(keys[1], (config.rows, config.positions), 0, config.vocab)
    head = jax.random.normal(keys[2], (config.width, config.vocab)) / config.width**0.5
    slopes = jax.random.normal(keys[3], (2, config.rows, config.positions))
    args = (head, hidden, tokens, slopes)
    place = targets.place(config.target)
    ways = {
        name: jax.jit(functools.partial(gradient, way, config)) for name, way in (("blocks", blocks(model)), ("plain", plain))
    }
    there = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    results = {name: {"temporary_bytes": plan.compiled(way, *there)["temporaries"]} for name, way in ways.items()}
    found: dict[str, Any] = {
        "logits_bytes": 4 * config.rows * config.positions * config.vocab,
        "plain_over_blocks_bytes": results["plain"]["temporary_bytes"] / results["blocks"]["temporary_bytes"],
        "results": results,
    }
    print(f"temporaries: {found['plain_over_blocks_bytes']:.1f} x as large without blocks")
    if config.target != "cpu":
        return found
    one, other = (jax.device_get(way(*args)) for way in ways.values())
    apart = [
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    ]
    limit = 3e-6 if config.dtype == "float32" else 2e-2
    if max(apart) > limit:
        raise SystemExit(f"numbers and gradients are apart by {apart} of the largest, more than {limit}")
    timed = measure.alternate({name: lambda way=way: way(*args) for name, way in ways.items()}, config.repeats)
    for name, result in results.items():
        result |= timed[name]
    count = config.rows * config.positions
    found["apart_of_the_largest"] = apart
    found["product_flop_per_s"] = jax_products.rate(count, config.width, config.vocab)
    found["plain_over_blocks"] = results["plain"]["median_ms"] / results["blocks"]["median_ms"]
    print(", ".join(f"{name} {r['median_ms']:.0f} ms" for name, r in results.items()) + f": {found['plain_over_blocks']:.2f} x")
    return found


Way = Callable[..., tuple[jax.Array, jax.Array | None]]


def gradient(way: Way, config: argparse.Namespace, head: Any, hidden: Any, tokens: Any, slopes: Any) -> Any:
    """A weighted sum of log-probs and entropies, and its gradient by the head's weights and the states."""

    def total(head: jax.Array, hidden: jax.Array) -> jax.Array:
        logprobs, entropy = way(config, head, hidden, tokens)
        return (slopes[0] * logprobs).sum() + (0.0 if entropy is None else (slopes[1] * entropy).sum())

    return jax.value_and_grad(total, argnums=(0, 1))(head, hidden)


def blocks(model: Any) -> Way:
    """The library's."""
    return lambda config, head, hidden, tokens: heads.token_logprobs(
        model, {"head": head}, hidden, tokens, entropy=not config.no_entropy
    )


def plain(config: argparse.Namespace, head: jax.Array, hidden: jax.Array, tokens: jax.Array) -> tuple:
    """As one would write it, left to autodiff and XLA."""
    operands = hidden.astype(config.dtype), head.astype(config.dtype)
    logprobs = jax.nn.log_softmax(jnp.matmul(*operands, preferred_element_type=jnp.float32), axis=-1)
    entropy = None if config.no_entropy else -(jnp.exp(logprobs) * logprobs).sum(-1)
    return jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0], entropy


if __name__ == "__main__":
    main()
