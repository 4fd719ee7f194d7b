"""Rollouts whose rows end at very different lengths: a wave that waits for the longest, one that ended rows leave, and slots.

    python benchmarks/rollout.py --rows 64                       # all rows at once: those that have ended leave
    python benchmarks/rollout.py --rows 512 --slots 64           # 64 at a time: their places are refilled

What bounds it: decode steps are weight products, so the time of a chunk falls with its rows until they are few; the ceiling is
real tokens over rows x steps. Lengths are forced and lognormal (`Prompts.limit`, no stop id), the same for all, so that speed
does not depend on the text; all must give the same tokens before any is timed; then they run alternately. With slots, the
static contender decodes as many rows at a time, batch after batch. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generate as shapes
import jax
import jax.numpy as jnp
import measure
import numpy as np

from jaxrlhf.core.types import Prompts, Rollout
from jaxrlhf.sampling import generate


def main() -> None:
    """Run all and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--slots", type=int, default=0, help="rows decoded at a time; 0: all")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128, help="most tokens of a response")
    parser.add_argument("--median", type=int, default=32, help="of the responses' lengths")
    parser.add_argument("--sigma", type=float, default=0.8, help="of their logarithms")
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    rates = measure.machine(config.repeats)
    measure.write(measure.head("rollout", vars(config)) | {"machine": rates, **compare(config, rates)}, config.result)


def compare(config: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """Milliseconds of each way, and what share of its rows x steps writes tokens."""
    model, params, shape = shapes.built(config.shape, config.prompt + config.new)
    prompts = with_lengths(config, shape.vocab_size)
    spec = shapes.spec(config.new, top_p=0.9)  # as for pairs and serving
    at_once = config.slots or config.rows
    steps: dict[str, int] = {}

    def way(name: str, parts: int, **given: Any) -> Callable[[], list[Rollout]]:
        """The rows in so many batches, one after another."""
        options = generate.Options(chunk=config.chunk, **given)
        batches = [jax.tree.map(lambda x, i=i: x[i::parts], prompts) for i in range(parts)]

        def call() -> list[Rollout]:
            key = jax.random.key(2)
            found = [generate.traced(model, params, each, spec, key, options=options) for each in batches]
            steps[name] = sum(rows * count for _, chunks in found for rows, count in chunks)
            return [rollout for rollout, _ in found]

        return call

    parts = config.rows // at_once
    cases = {"static": way("static", parts, least=config.rows), "rows leave": way("rows leave", parts)}
    if config.slots:
        cases["slots"] = way("slots", 1, slots=config.slots)
    tokens = {name: by_group(case()) for name, case in cases.items()}
    differing = {name: int((own != tokens["static"]).any(axis=1).sum()) for name, own in tokens.items()}
    if max(differing.values()) > config.rows // 32:  # a draw within rounding of a border between two tokens may fall either way
        raise SystemExit(f"of {config.rows} responses differ {differing}: nothing to compare")
    results = measure.alternate(cases, config.repeats)
    lengths = np.asarray(prompts.limit)
    per_token = 2 * (sum(x.size for x in jax.tree.leaves(params["layers"])) + shape.vocab_size * shape.width)
    for name, result in results.items():
        result["utilisation"] = int(lengths.sum()) / steps[name]
        result["tokens_per_s"] = 1e3 * int(lengths.sum()) / result["median_ms"]
        result["share_of_product_rate"] = result["tokens_per_s"] * per_token / rates["product_flop_per_s"]
        result["static_over_this"] = results["static"]["median_ms"] / result["median_ms"]
    said = [
        f"{name} {r['median_ms']:.0f} ms (utilisation {r['utilisation']:.2f}, {r['static_over_this']:.2f} x)"
        for name, r in results.items()
    ]
    print(f"{config.rows} rows, lengths {lengths.min()} to {lengths.max()}: " + ", ".join(said))
    return {
        "model": dataclasses.asdict(shape),
        "tokens": int(lengths.sum()),
        "differing_responses": differing,
        "results": results,
    }


def by_group(rollouts: list[Rollout]) -> np.ndarray:
    """Rows of tokens in the order of the prompts' uids."""
    tokens, group = (np.concatenate([np.asarray(getattr(each, name)) for each in rollouts]) for name in ("tokens", "group"))
    return tokens[np.argsort(group)]


def with_lengths(config: argparse.Namespace, vocab: int) -> Prompts:
    """Prompts whose responses have lognormal lengths."""
    lengths = config.median * np.exp(config.sigma * np.random.default_rng(0).normal(size=config.rows))
    limit = jnp.asarray(np.clip(np.round(lengths), 1, config.new), jnp.int32)
    return dataclasses.replace(shapes.prompts_of(config.rows, config.prompt, vocab), limit=limit)


if __name__ == "__main__":
    main()
