"""What of a layer is stored for the backward pass: bytes and milliseconds of one gradient under each choice of `remat`.

    python benchmarks/remat.py --rows 8 --length 128
    python benchmarks/remat.py --target h100 --rows 8 --length 2048 --dtype bfloat16 --size 0.5b    # bytes alone, none needed

What bounds it: `none` keeps every intermediate, `layers` pays one more forward pass (8 in place of 6 FLOP a weight and token).
All choices must give the same loss and gradient before any is timed; then they run alternately.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import targets

from jaxrlhf.algorithms import lm
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import objective

CHOICES = ("none", "dots", "attention", "layers")
SIZES = {
    "tiny": TransformerConfig(512, 128, 4, 4, 4, 32, 384, 2048),
    "small": TransformerConfig(8192, 512, 6, 8, 8, 64, 1408, 2048),
    "0.5b": TransformerConfig(151_936, 896, 24, 14, 2, 64, 4864, 2048),  # Qwen2.5-0.5B's shape
    "mixture": TransformerConfig(32_000, 1024, 12, 16, 4, 64, 1792, 2048, experts=8, experts_per_token=2),
}


def main() -> None:
    """Compile, compare and time; one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--target", choices=["here", "h100"], default="here")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    place = targets.place(settings.target)
    results: dict[str, dict[str, Any]] = {}
    cases, found = {}, {}
    config = dataclasses.replace(SIZES[settings.size], dtype=settings.dtype)
    for choice in CHOICES:
        model = transformer.build(dataclasses.replace(config, remat=choice))
        program = jax.jit(jax.value_and_grad(loss_of(model)))
        shapes = (
            jax.eval_shape(model.init, jax.random.key(0)),
            jax.ShapeDtypeStruct((settings.rows, settings.length), jnp.int32),
        )
        there = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
        options: Any = {"xla_gpu_autotune_level": "0"} if settings.target == "h100" else None
        compiled = program.lower(*there).compile(options)
        memory: Any = compiled.memory_analysis()
        results[choice] = {"temporary_bytes": memory.temp_size_in_bytes}
        print(choice, f"{results[choice]['temporary_bytes'] / 2**20:,.0f} MiB", flush=True)
        if settings.target == "here":
            params = model.init(jax.random.key(0))
            tokens = np.random.default_rng(0).integers(3, config.vocab_size, shapes[1].shape).astype(np.int32)
            cases[choice] = lambda run=compiled, params=params, tokens=tokens: run(params, tokens)
            found[choice] = cases[choice]()
    document = measure.head("remat", vars(settings)) | {"model": dataclasses.asdict(config)}
    if settings.target == "here":
        agree(found)
        timed = measure.alternate(cases, settings.repeats)
        results = {name: result | timed[name] for name, result in results.items()}
        document["machine"] = measure.machine(settings.repeats)
    else:
        document["device"] = "NVIDIA H100 80GB HBM3, compiled for and not run"
    measure.write(document | {"results": results}, settings.out)


def loss_of(model: Any) -> Any:
    """(params, tokens) -> mean negative log-likelihood of packed rows."""
    outputs = objective.make_outputs(model, packed=True)

    def loss(params, tokens):
        batch = lm.packed(tokens)
        term = lm.loss(outputs(params, None, batch, None), batch, lm.Config())[0]["loss/lm"]
        return term.sum / term.count

    return loss


def agree(found: dict[str, tuple[jax.Array, Any]]) -> None:
    """Stop unless all choices give one loss and one gradient."""
    loss, slope = found[CHOICES[0]]
    for name, (other, others) in found.items():
        off = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), others, slope)
        if abs(loss - other) > 1e-6 * abs(loss) or max(jax.tree.leaves(off)) > 1e-4:
            raise SystemExit(f"remat='{name}': loss {other} in place of {loss}, gradients off by {off}: nothing to compare")


if __name__ == "__main__":
    main()
