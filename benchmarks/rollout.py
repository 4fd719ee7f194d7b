"""Rollouts whose rows end at very different lengths: a wave that waits for the longest, one that ended rows leave, and slots.

    python benchmarks/rollout.py --rows 64                       # all rows at once: those that have ended leave
    python benchmarks/rollout.py --rows 512 --slots 64           # 64 at a time: their places are refilled
    python benchmarks/rollout.py --rows 512 --stragglers 8       # batches of 64, each of which leaves 8 rows to the next

What bounds it: decode steps are weight products, so on a CPU the time of a chunk falls with its rows until they are few, and
the ceiling is real tokens over rows x steps; where reading the weights takes the time, steps alone count. Batches that leave
rows to the next write the tokens of others instead. Lengths are forced and lognormal (`Prompts.limit`, no stop id), the same
for all, so that speed does not depend on the text; all must give the same tokens before any is timed; then they run
alternately. With slots, the static contender decodes as many rows at a time, batch after batch. The last line of stdout is one
JSON document.
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
from jaxrlhf.sampling import generate, stragglers


def main() -> None:
    """Run all and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--slots", type=int, default=0, help="rows decoded at a time; 0: all")
    parser.add_argument("--stragglers", type=int, default=0, help="rows under way besides those of a batch")
    parser.add_argument("--batch", type=int, default=64, help="rows of a batch, with --stragglers")
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
    prompts, besides = with_lengths(config, shape.vocab_size)
    spec = shapes.spec(config.new, top_p=0.9)  # as for pairs and serving
    at_once = config.slots or (config.batch if config.stragglers else config.rows)
    spent: dict[str, list[tuple[int, int]]] = {}  # rows and steps of each chunk
    written: dict[str, int] = {}

    def way(name: str, parts: int, **given: Any) -> Callable[[], list[Rollout]]:
        """The rows in so many batches, one after another."""
        options = generate.Options(chunk=config.chunk, **given)
        batches = [jax.tree.map(lambda x, i=i: x[i::parts], prompts) for i in range(parts)]

        def call() -> list[Rollout]:
            key = jax.random.key(2)
            found = [generate.traced(model, params, each, spec, key, options=options) for each in batches]
            spent[name] = [chunk for _, chunks in found for chunk in chunks]
            written[name] = int(np.asarray(prompts.limit).sum())
            return [rollout for rollout, _ in found]

        return call

    def carried() -> list[Rollout]:
        """The same batches, with stragglers."""
        begun, found, spent["stragglers"] = stragglers.begin(besides, model, spec), [], []
        for i in range(parts):
            each = jax.tree.map(lambda x, i=i: x[i::parts], prompts)
            options = generate.Options(chunk=config.chunk)
            full, _, begun, chunks = stragglers.carry_on(model, params, each, begun, spec, jax.random.key(2), options=options)
            found.append(full)
            spent["stragglers"] += chunks
        ended = sum(int(np.asarray(each.response_len).sum()) for each in found)
        written["stragglers"] = ended + int(np.asarray(begun.rollout.response_len).sum())
        return found

    parts = config.rows // at_once
    cases = {"static": way("static", parts, least=config.rows), "rows leave": way("rows leave", parts)}
    if config.slots:
        cases["slots"] = way("slots", 1, slots=config.slots)
    if config.stragglers:
        cases["stragglers"] = carried
    tokens = {name: by_uid(case()) for name, case in cases.items()}
    static = tokens["static"]  # which has no rows of the prompts besides
    differing = {name: sum(row != static.get(uid, row) for uid, row in own.items()) for name, own in tokens.items()}
    if max(differing.values()) > config.rows // 32:  # a draw within rounding of a border between two tokens may fall either way
        raise SystemExit(f"of {config.rows} responses differ {differing}: nothing to compare")
    results = measure.alternate(cases, config.repeats)
    lengths = np.asarray(prompts.limit)
    per_token = 2 * (sum(x.size for x in jax.tree.leaves(params["layers"])) + shape.vocab_size * shape.width)
    for name, result in results.items():
        result["steps"] = sum(count for _, count in spent[name])
        result["utilisation"] = written[name] / sum(rows * count for rows, count in spent[name])
        result["tokens_per_s"] = 1e3 * written[name] / result["median_ms"]
        result["share_of_product_rate"] = result["tokens_per_s"] * per_token / rates["product_flop_per_s"]
        result["static_over_this"] = result["tokens_per_s"] / results["static"]["tokens_per_s"]  # time of as many tokens
    said = [
        f"{name} {r['median_ms']:.0f} ms ({r['steps']} steps, used {r['utilisation']:.2f}; {r['static_over_this']:.2f} x)"
        for name, r in results.items()
    ]
    print(f"{config.rows} rows, lengths {lengths.min()} to {lengths.max()}: " + ", ".join(said))
    return {
        "model": dataclasses.asdict(shape),
        "tokens": written,
        "differing_responses": differing,
        "results": results,
    }


def by_uid(rollouts: list[Rollout]) -> dict[int, list[int]]:
    """The rows of tokens by the uids of their prompts."""
    return {uid: row for each in rollouts for uid, row in zip(each.group.tolist(), each.tokens.tolist(), strict=True)}


def with_lengths(config: argparse.Namespace, vocab: int) -> tuple[Prompts, Prompts]:
    """Prompts whose responses have lognormal lengths, and as many more as there are stragglers."""
    count = config.rows + config.stragglers
    lengths = config.median * np.exp(config.sigma * np.random.default_rng(0).normal(size=count))
    limit = jnp.asarray(np.clip(np.round(lengths), 1, config.new), jnp.int32)
    every = dataclasses.replace(shapes.prompts_of(count, config.prompt, vocab), limit=limit)
    return jax.tree.map(lambda x: x[: config.rows], every), jax.tree.map(lambda x: x[config.rows :], every)


if __name__ == "__main__":
    main()
