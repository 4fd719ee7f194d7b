"""Nucleus by a sort against nucleus by a threshold, and a whole generation at the size of the default PPO run.

    python benchmarks/sampling.py --batch 256 --vocab 4096

What bounds it: the nucleus by reading the logits, one copy of which is the ceiling; the generation by its weight products on
a CPU, at the rate of one large product, and by reading weights and cache on a GPU. Every row writes all its tokens (no
stop id), so that speed does not depend on the text. The sort is what transformers and Tunix do: sort, cumulative sum, one
Gumbel number a token. Both must keep the same tokens before either is timed; then they run alternately.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.heads import IMPOSSIBLE
from jaxrlhf.sampling import filters, generate, nucleus


def main() -> None:
    """Run every comparison and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--new", type=int, default=28)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    config = parser.parse_args()
    rates = machine(config.repeats)
    report = {
        "benchmark": "sampling",
        "settings": vars(config),
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
        "commit": commit(),
        "machine": rates,
        "nucleus": compare_nucleus(config, rates),
        "generate": time_generate(config, rates),
    }
    print(json.dumps(report))


def compare_nucleus(config: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """Milliseconds to filter and draw one token of every row, by a sort and by ours, alternately."""
    spec = rules(config, config.top_p)
    logits = 3 * jax.random.normal(jax.random.key(0), (config.batch, config.vocab))
    uniform = jax.random.uniform(jax.random.key(1), (config.batch,))

    def ours(logits):
        return nucleus.draw(filters.apply(logits, spec), uniform)

    def by_sort(logits):
        return jax.random.categorical(jax.random.key(1), sorted_nucleus(logits, config.top_p), axis=-1)

    ours_kept = jax.jit(filters.apply, static_argnums=1)(logits, spec) > IMPOSSIBLE
    sort_kept = jax.jit(sorted_nucleus, static_argnums=1)(logits, config.top_p) > IMPOSSIBLE
    differing = int((ours_kept != sort_kept).sum())
    if differing > config.batch // 50:  # a token whose mass is within rounding of top_p may fall on either side
        raise SystemExit(f"the two nuclei differ in {differing} tokens: nothing to compare")
    results = alternate({"sort": (by_sort, logits), "threshold": (ours, logits)}, config.repeats)
    copy = 1e3 * 2 * logits.nbytes / rates["copy_bytes_per_s"]
    ratio = results["sort"]["median_ms"] / results["threshold"]["median_ms"]
    line = ", ".join(f"{name} {r['median_ms']:.1f} ms" for name, r in results.items())
    print(f"nucleus [{config.batch}, {config.vocab}] top_p {config.top_p}: {line}, {ratio:.1f} x")
    return {
        "results": results,
        "ratio": ratio,
        "differing_tokens": differing,
        "kept_mean": float(ours_kept.sum(-1).mean()),
        "share_of_copy_rate": copy / results["threshold"]["median_ms"],
    }


def sorted_nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """The peers' way: sort all, and keep while the mass before a token is below top_p."""
    descending = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(descending, axis=-1)
    kept = (jnp.cumsum(probability, axis=-1) - probability < top_p).sum(-1, keepdims=True)
    return jnp.where(logits >= jnp.take_along_axis(descending, kept - 1, axis=-1), logits, IMPOSSIBLE)


def time_generate(config: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """A whole generation, from prompts to rollout, without a filter and with top-p."""
    shape = TransformerConfig(
        vocab_size=config.vocab,
        width=192,
        layers=4,
        heads=4,
        kv_heads=4,
        head_width=48,
        mlp_width=512,
        max_length=max(64, config.prompt + config.new),
        dtype=config.dtype,
    )
    model = transformer.build(shape)
    params = model.init(jax.random.key(0))
    count = jnp.arange(config.batch, dtype=jnp.int32)
    tokens = jax.random.randint(jax.random.key(1), (config.batch, config.prompt), 3, config.vocab)
    prompts = Prompts(tokens=tokens, length=jnp.full_like(count, config.prompt), uid=count, row=count)

    def run(top_p):
        return lambda key: generate.generate(model, params, prompts, rules(config, top_p), key)

    cases = {"top_p 1": (run(1.0), jax.random.key(2)), f"top_p {config.top_p}": (run(config.top_p), jax.random.key(2))}
    results = alternate(cases, config.repeats, jitted=True)
    weights = sum(x.size for x in jax.tree.leaves(params["layers"]))
    embed = config.vocab * shape.width
    flops = 2 * config.batch * ((config.prompt + config.new) * weights + config.new * embed)
    for name, result in results.items():
        result["tokens_per_s"] = 1e3 * config.batch * config.new / result["median_ms"]
        result["share_of_product_rate"] = flops / rates["product_flop_per_s"] / (1e-3 * result["median_ms"])
        speed = f"{result['median_ms']:.0f} ms, {result['tokens_per_s']:.0f} tokens/s"
        print(f"generate {config.batch} x {config.new}, {name}: {speed}")
    return {"model": vars(shape) | {"parameters": weights + embed}, "results": results}


def rules(config: argparse.Namespace, top_p: float) -> SamplingSpec:
    """A distribution without a stop id: every row writes all its tokens."""
    return SamplingSpec(temperature=0.8, max_tokens=config.new, stop=(), forbidden=(0, 1, 2), top_p=top_p)


def alternate(cases: dict[str, tuple[Callable, Any]], repeats: int, jitted: bool = False) -> dict[str, dict[str, float]]:
    """Wall and processor milliseconds of each case, taken in turn so that a busy machine slows all alike."""
    compiled, results = {}, {}
    for name, (function, argument) in cases.items():
        compiled[name] = function if jitted else jax.jit(function)
        start = time.perf_counter()
        jax.block_until_ready(compiled[name](argument))
        results[name] = {"first_call_s": time.perf_counter() - start, "wall": [], "processor": []}
    for _ in range(repeats):
        for name, (_, argument) in cases.items():
            start, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(compiled[name](argument))
            results[name]["wall"].append(1e3 * (time.perf_counter() - start))
            results[name]["processor"].append(1e3 * (time.process_time() - used))
    for result in results.values():
        wall, processor = result.pop("wall"), result.pop("processor")
        result |= {"median_ms": statistics.median(wall), "min_ms": min(wall), "max_ms": max(wall)}
        result["processor_median_ms"] = statistics.median(processor)
    return results


def machine(repeats: int) -> dict[str, float]:
    """The rates of one large float32 product and one large copy, the best of some: the ceilings."""
    x = jnp.ones((2048, 2048))
    big = jnp.ones(2**24)
    timed = alternate({"product": (lambda x: x @ x, x), "copy": (lambda x: x + 1, big)}, repeats)
    return {
        "product_flop_per_s": 2 * 2048**3 / (1e-3 * timed["product"]["min_ms"]),
        "copy_bytes_per_s": 2 * big.nbytes / (1e-3 * timed["copy"]["min_ms"]),
    }


def commit() -> str:
    """The checkout's commit, short."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
