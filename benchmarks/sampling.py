"""Nucleus sampling of one token a row: by a sort, by the search of a threshold (ours), and pruned to a few blocks.

    python benchmarks/sampling.py --batch 256 --vocab 4096

On three distributions, because pruning is exact only where the nucleus is small: `flat`, as of a policy that has learned
little, `usual`, and `peaked`. What bounds all is reading the logits, one copy of which is the ceiling. The sort is what
transformers and Tunix do: sort, cumulative sum, one Gumbel number a token. Pruned: the blocks of 128 ids with the largest
logits alone are searched, and a row whose nucleus may reach beyond them is flagged; a real sampler would have to do these
again by another way. All must keep the same tokens, in rows that are not flagged, before any is timed; then they run
alternately. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure

from jaxrlhf.core.types import SamplingSpec
from jaxrlhf.models.heads import IMPOSSIBLE
from jaxrlhf.sampling import filters, nucleus

SCALES = {"flat": 0.5, "usual": 3.0, "peaked": 8.0}  # standard deviations of normal logits
BLOCK = 128


def main() -> None:
    """Compare on every distribution and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--blocks", type=int, default=16, help="that pruning keeps")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    rates = measure.machine(config.repeats)
    found = {name: compare(config, name, scale, rates) for name, scale in SCALES.items()}
    measure.write(measure.head("sampling", vars(config)) | {"machine": rates, "distributions": found}, config.result)


def compare(config: argparse.Namespace, name: str, scale: float, rates: dict[str, float]) -> dict[str, Any]:
    """Milliseconds to filter and draw one token of every row."""
    spec = SamplingSpec(temperature=1.0, max_tokens=1, stop=(), top_p=config.top_p)
    logits = scale * jax.random.normal(jax.random.key(0), (config.batch, config.vocab))
    uniform = jax.random.uniform(jax.random.key(1), (config.batch,))
    threshold = jax.jit(lambda x, u: nucleus.draw(filters.apply(x, spec), u))
    sort = jax.jit(lambda x: jax.random.categorical(jax.random.key(1), sorted_nucleus(x, config.top_p), axis=-1))
    prune = jax.jit(functools.partial(block_pruned, top_p=config.top_p, blocks=config.blocks))
    cases = {
        "sort": lambda: sort(logits),
        "threshold": lambda: threshold(logits, uniform),
        "pruned": lambda: prune(logits, uniform),
    }
    kept = jax.jit(filters.apply, static_argnums=1)(logits, spec) > IMPOSSIBLE
    sort_kept = jax.jit(sorted_nucleus, static_argnums=1)(logits, config.top_p) > IMPOSSIBLE
    token, exact = prune(logits, uniform)
    differing = int((kept != sort_kept).sum()) + int(((token != threshold(logits, uniform)[0]) & exact).sum())
    if differing > config.batch // 50:  # a token whose mass is within rounding of top_p may fall on either side
        raise SystemExit(f"{name}: the nuclei differ in {differing} tokens: nothing to compare")
    results = measure.alternate(cases, config.repeats)
    copy = 1e3 * 2 * logits.nbytes / rates["copy_bytes_per_s"]
    median = {each: result["median_ms"] for each, result in results.items()}
    line = ", ".join(f"{each} {ms:.2f} ms" for each, ms in median.items())
    print(f"{name} [{config.batch}, {config.vocab}] top_p {config.top_p}: {line}; pruned exact in {float(exact.mean()):.0%}")
    return {
        "results": results,
        "sort_over_threshold": median["sort"] / median["threshold"],
        "pruned_over_threshold": median["pruned"] / median["threshold"],
        "pruned_exact_rows": float(exact.mean()),
        "differing_tokens": differing,
        "kept_mean": float(kept.sum(-1).mean()),
        "share_of_copy_rate": copy / median["threshold"],
    }


def sorted_nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """The peers' way: sort all, and keep while the mass before a token is below top_p."""
    descending = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(descending, axis=-1)
    kept = (jnp.cumsum(probability, axis=-1) - probability < top_p).sum(-1, keepdims=True)
    return jnp.where(logits >= jnp.take_along_axis(descending, kept - 1, axis=-1), logits, IMPOSSIBLE)


def block_pruned(logits: jax.Array, uniform: jax.Array, top_p: float, blocks: int) -> tuple[jax.Array, jax.Array]:
    """A token of each row, drawn from the nucleus within the blocks of the largest logits; and whether that is all of it."""
    rows, vocab = logits.shape
    every = jnp.pad(logits, ((0, 0), (0, -vocab % BLOCK)), constant_values=IMPOSSIBLE).reshape(rows, -1, BLOCK)
    largest = every.max(-1)
    top = largest.max(-1)
    target = top_p * jnp.exp(every - top[:, None, None]).sum((1, 2))
    blocks = min(blocks, every.shape[1] - 1)
    bound, chosen = jax.lax.top_k(largest, blocks + 1)
    chosen = jnp.sort(chosen[:, :blocks], axis=1)  # in the order of ids, as all others draw
    few = jnp.take_along_axis(every, chosen[..., None], axis=1).reshape(rows, -1)
    weight = jnp.exp(few - top[:, None])

    def enough(bits: jax.Array) -> jax.Array:
        least = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.where(weight >= least[:, None], weight, 0.0).sum(-1) >= target

    border = filters._largest(enough, jnp.zeros(rows, jnp.int32))
    least = jax.lax.bitcast_convert_type(border, jnp.float32)
    place, _ = nucleus.draw(jnp.where(weight >= least[:, None], few, IMPOSSIBLE), uniform)
    token = jnp.take_along_axis(chosen, place[:, None] // BLOCK, axis=1)[:, 0] * BLOCK + place % BLOCK
    return token, (bound[:, blocks] < top + jnp.log(least)) & enough(border)


if __name__ == "__main__":
    main()
