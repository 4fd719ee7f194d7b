"""What the benchmarks share: timing cases in turn, the machine's own rates, and the head of a result."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peers import jax_products


def alternate(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Wall and processor milliseconds of each case, taken in turn, every second time from the last to the first: A B B A, so
    that a busy machine slows all alike and a drift over an even number of repeats cancels.

    A case gives something of jax to wait for, or its own two numbers of milliseconds (wall, processor). What it works on must
    be an argument of its compiled function: of a constant, XLA would compute the result while it compiles.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        results[name] = {"first_call_s": 1e-3 * _timed(case)[0], "wall": [], "processor": []}
    for i in range(repeats):
        for name, case in mirrored(cases, i):
            wall, processor = _timed(case)
            results[name]["wall"].append(wall)
            results[name]["processor"].append(processor)
    for result in results.values():
        wall, processor = result.pop("wall"), result.pop("processor")
        result |= {"median_ms": statistics.median(wall), "min_ms": min(wall), "max_ms": max(wall)}
        result["processor_median_ms"] = statistics.median(processor)
    return results


def mirrored(cases: dict[str, Any], i: int) -> list[tuple[str, Any]]:
    """The cases in the order of round i: forwards, then backwards, then forwards."""
    return list(cases.items())[:: -1 if i % 2 else 1]


def _timed(case: Callable[[], Any]) -> tuple[float, float]:
    start, used = time.perf_counter(), time.process_time()
    found = case()
    if isinstance(found, tuple) and all(isinstance(x, float) for x in found):
        return found
    jax.block_until_ready(found)
    return 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - used)


def machine(repeats: int) -> dict[str, float]:
    """The rates of one large float32 product and one large copy, the best of some: the ceilings."""
    x, big = jnp.ones((2048, 2048)), jnp.ones(2**24)
    product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
    timed = alternate({"product": lambda: product(x), "copy": lambda: copy(big)}, repeats)
    return {
        "product_flop_per_s": 2 * 2048**3 / (1e-3 * timed["product"]["min_ms"]),
        "copy_bytes_per_s": 2 * big.nbytes / (1e-3 * timed["copy"]["min_ms"]),
    }


class Peer:
    """A contender in a process of its own: see benchmarks/peers/."""

    def __init__(self, script: str | Path, python: Path, *arguments: Any):
        """Start a script, or the one of this name in benchmarks/peers/, and wait until its model is made. An argument that is
        not text is given to it as JSON."""
        path = script if isinstance(script, Path) else Path(__file__).parent / "peers" / f"{script}.py"
        given = [each if isinstance(each, str) else json.dumps(each) for each in arguments]
        self.process = subprocess.Popen(
            [str(python), str(path), *given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of JSON that it prints."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"'):  # a peer's own progress may be a dict of Python
                return json.loads(line)
        raise SystemExit(f"{self.process.args}: ended with code {self.process.wait()}")

    def run(self) -> dict[str, Any]:
        """Do its work once: what it says of it."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def times(said: dict[str, Any], losses: list[float] | None = None) -> tuple[float, float]:
    """Milliseconds by the clock, and of its processors, of what a peer did; its loss is put down in `losses`."""
    if losses is not None:
        losses.append(said["loss"])
    return 1e3 * said["wall"], 1e3 * said["processor"]


Products = dict[str, dict[str, Any]]
"""The weight products that a work asks for, whoever does it: stage -> {"shape": [m, k, n], "flops": of them all}. A shape
stands for all of its stage's: rows by width by the MLP's width for layers, by the vocabulary for the head."""


def rates(products: Products) -> dict[str, float]:
    """Floating-point operations a second of each stage's product, in this process: peers measure theirs alike."""
    return jax_products.rates(products)


def at_rate_ms(products: Products, rates: dict[str, float]) -> float:
    """Milliseconds that the products alone take at these rates."""
    return 1e3 * sum(each["flops"] / rates[name] for name, each in products.items())


def against(
    results: dict[str, dict[str, float]], products: Products, own: dict[str, float], peers: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Adds to every result the share of its own library's product rate that it reaches: what its products take alone at that
    rate, over the time. `own` is our rates, and each of `peers` says its own in `product_rates`.

    What is given back holds, of each peer, `peer over ours` of each of our results, and the most that this ratio could be for
    any float32 program with our products: `bound by products`.
    """
    floor = at_rate_ms(products, own)
    ours = [name for name in results if name not in peers]
    for name in ours:
        results[name]["share_of_product_rate"] = floor / results[name]["median_ms"]
    ratios, bounds = {}, {}
    for peer, about in peers.items():
        time_ms = results[peer]["median_ms"]
        results[peer]["share_of_product_rate"] = at_rate_ms(products, about["product_rates"]) / time_ms
        ratios |= {f"{peer} over {name}": time_ms / results[name]["median_ms"] for name in ours}
        bounds[peer] = time_ms / floor
    return {
        "products": products,
        "product_rates": {"jaxrlhf": own} | {peer: about["product_rates"] for peer, about in peers.items()},
        "ratios": ratios,
        "bound_by_products": bounds,
    }


def tell(results: dict[str, dict[str, float]], found: dict[str, Any]) -> None:
    """A line for each contender: its time, its share of its product rate, and what each peer takes."""
    for name, result in results.items():
        said = f"{name}: {result['median_ms']:.1f} ms, {result['share_of_product_rate']:.2f} of its own product rate"
        for peer, bound in found["bound_by_products"].items():
            if f"{peer} over {name}" in found["ratios"]:
                said += (
                    f"; {peer} takes {found['ratios'][f'{peer} over {name}']:.2f} x (bound by products: at most {bound:.1f} x)"
                )
        print(said)


def head(benchmark: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What every result begins with."""
    return {
        "benchmark": benchmark,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "settings": {name: value.name if isinstance(value, Path) else value for name, value in settings.items()},  # no folders
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "load": os.getloadavg()[0],  # processes that ran or waited in the minute before: a contended result says so
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
    }


def write(document: dict[str, Any], path: Path | None) -> None:
    """The JSON document as the last line of stdout, and in a file where one is asked for."""
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def commit() -> str:
    """The checkout's commit, short."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
