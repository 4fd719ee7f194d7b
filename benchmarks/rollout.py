"""Rollouts whose rows end at very different lengths: a wave that waits for its longest row, against one that ended rows leave.

    python benchmarks/rollout.py --rows 64 --new 128 --median 32

What bounds it: decode steps are weight products, so the time of a chunk falls with its rows until they are few; the ceiling is
real tokens over rows x steps of the static wave. Lengths are forced and lognormal (`Prompts.limit`, no stop id), the same for
both, so that speed does not depend on the text; both must give the same tokens before either is timed; then they run
alternately. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sampling

from jaxrlhf.core.types import Prompts, Rollout, SamplingSpec
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.sampling import generate

SHAPES = {  # width, layers, heads, vocabulary
    "small": (128, 4, 4, 512),
    "medium": (512, 6, 8, 8192),
}


def main() -> None:
    """Run both and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128, help="most tokens of a response")
    parser.add_argument("--median", type=int, default=32, help="of the responses' lengths")
    parser.add_argument("--sigma", type=float, default=0.8, help="of their logarithms")
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    config = parser.parse_args()
    rates = sampling.machine(config.repeats)
    report = {
        "benchmark": "rollout",
        "settings": vars(config),
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
        "commit": sampling.commit(),
        "machine": rates,
        **compare(config, rates),
    }
    print(json.dumps(report))


def compare(config: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """Milliseconds of a static wave and of one that rows leave, and what share of its steps writes tokens."""
    width, layers, heads, vocab = SHAPES[config.shape]
    shape = TransformerConfig(
        vocab_size=vocab,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_width=4 * width,
        max_length=config.prompt + config.new,
        dtype=config.dtype,
    )
    model = transformer.build(shape)
    params = model.init(jax.random.key(0))
    prompts = with_lengths(config, vocab)
    # Top-p 0.9 as for pairs and serving, temperature 1, log-probs kept as always.
    spec = SamplingSpec(temperature=1.0, max_tokens=config.new, stop=(), top_p=0.9)
    steps: dict[str, int] = {}

    def run(name: str, least: int):
        def call(key: jax.Array) -> Rollout:
            generate.LEAST = least
            return generate.generate(model, params, prompts, spec, key, options=generate.Options(config.chunk))

        steps[name] = row_steps(config, prompts, least)
        return call

    cases = {"static": run("static", config.rows), "rows leave": run("rows leave", 8)}
    key = jax.random.key(2)
    first, second = (np.asarray(case(key).tokens) for case in cases.values())
    differing = int((first != second).any(axis=1).sum())
    if differing > config.rows // 32:  # a draw within rounding of a border between two tokens may fall on either side
        raise SystemExit(f"{differing} of {config.rows} responses differ: nothing to compare")
    results = sampling.alternate({name: (case, key) for name, case in cases.items()}, config.repeats, jitted=True)
    lengths = np.asarray(prompts.limit)
    tokens = int(lengths.sum())
    per_token = 2 * (sum(x.size for x in jax.tree.leaves(params["layers"])) + vocab * width)
    for name, result in results.items():
        result["utilisation"] = tokens / steps[name]
        result["tokens_per_s"] = 1e3 * tokens / result["median_ms"]
        result["share_of_product_rate"] = tokens * per_token / rates["product_flop_per_s"] / (1e-3 * result["median_ms"])
    ratio = results["static"]["median_ms"] / results["rows leave"]["median_ms"]
    said = ", ".join(f"{name} {r['median_ms']:.0f} ms (utilisation {r['utilisation']:.2f})" for name, r in results.items())
    print(f"{config.rows} rows, lengths {lengths.min()} to {lengths.max()}: {said}, {ratio:.2f} x")
    return {
        "model": vars(shape) | {"parameters": per_token // 2},
        "tokens": tokens,
        "differing_responses": differing,
        "results": results,
        "ratio": ratio,
    }


def with_lengths(config: argparse.Namespace, vocab: int) -> Prompts:
    """Prompts whose responses have lognormal lengths."""
    lengths = config.median * np.exp(config.sigma * np.random.default_rng(0).normal(size=config.rows))
    count = jnp.arange(config.rows, dtype=jnp.int32)
    return Prompts(
        tokens=jax.random.randint(jax.random.key(1), (config.rows, config.prompt), 3, vocab),
        length=jnp.full_like(count, config.prompt),
        uid=count,
        row=count,
        limit=jnp.asarray(np.clip(np.round(lengths), 1, config.new), jnp.int32),
    )


def row_steps(config: argparse.Namespace, prompts: Prompts, least: int) -> int:
    """Rows x steps that a wave decodes, by the sampler's own rule."""
    chunks = -(-config.new // config.chunk)
    steps = -(-config.new // chunks)
    rows, total, limit = config.rows, 0, np.asarray(prompts.limit)
    generate.LEAST = least
    for left in reversed(range(chunks)):
        total += rows * steps
        live = int((limit > (chunks - left) * steps).sum())
        if not left or not live:
            break
        rows = generate._fewer(rows, live, left)
    return total


if __name__ == "__main__":
    main()
