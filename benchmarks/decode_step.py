r"""What one decode chunk needs beside its weights, and where its time goes.

    python benchmarks/decode_step.py --shape small
    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_autotune_level=0 python benchmarks/decode_step.py --shape gpt2 --target h100

The second needs jax-cuda12-pjrt and jax-cuda12-plugin (pip install --no-deps), and no GPU: it compiles, and times nothing.
Counted is what the compiler says of a chunk of 16 steps: arguments (weights, cache, rows) and temporaries. Timed on the device
at hand are the parts of a step: the layers with the cache, the head, the filter and the draw, each alone; and chunks of 1, 8
and 32 steps. What bounds a step is reading the weights, and on a CPU the products. The last line of stdout is one JSON
document.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import generate as shapes
import jax
import jax.numpy as jnp
import measure
import targets

from jaxrlhf.models.model import EXACT
from jaxrlhf.sampling import decode, filters, nucleus

CHUNKS = (1, 8, 32)


def main() -> None:
    """Compile, time where the target is the device at hand, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--target", choices=["here", "h100"], default="here")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    place = targets.h100() if config.target == "h100" else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    document = measure.head("decode_step", vars(config)) | {"memory": memory(config, place)}
    if config.target == "here":
        document |= {"machine": measure.machine(config.repeats), "times": times(config)}
    measure.write(document, config.result)


def memory(config: argparse.Namespace, place: Any) -> dict[str, float]:
    """Bytes of a chunk of 16 steps."""
    model, _, given = abstract(config)
    spec = shapes.spec(config.new, top_p=0.9)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), given)
    sizes: Any = decode.advance.lower(model, spec, 16, *given).compile().memory_analysis()
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(given[0]))
    found = {"weights": weights, "arguments": sizes.argument_size_in_bytes, "temporaries": sizes.temp_size_in_bytes}
    found["temporaries_of_weights"] = found["temporaries"] / weights
    print(", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in found.items() if size > 1), end="")
    print(f"; temporaries are {found['temporaries_of_weights']:.1%} of the weights")
    return found


def abstract(config: argparse.Namespace) -> tuple[Any, Any, tuple[Any, Any]]:
    """The model, its prompts, and the shapes of weights and state between two chunks."""
    model, shape = shapes.model_of(config.shape, config.prompt + config.new, config.dtype)
    prompts = jax.eval_shape(lambda: shapes.prompts_of(config.rows, config.prompt, shape.vocab_size))
    weights = jax.eval_shape(lambda key: model.decode_params(model.init(key)), jax.random.key(0))
    spec, how = shapes.spec(config.new, top_p=0.9), decode.Shape(n=1, width=config.new, cache=EXACT)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda w, p, k: decode.start(model, spec, how, config.new, w, p, k, None), weights, prompts, key)
    return model, prompts, (weights, state)


def times(config: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the parts of a step, and of a step in chunks of different lengths."""
    model, params, shape = shapes.built(config.shape, config.prompt + config.new, config.dtype)
    spec, how = shapes.spec(config.new, top_p=0.9), decode.Shape(n=1, width=config.new, cache=EXACT)
    weights = decode.decode_params(model, params)
    prompts = shapes.prompts_of(config.rows, config.prompt, shape.vocab_size)
    state = decode.start(model, spec, how, config.new, weights, prompts, jax.random.key(0), None)
    hidden, token = state.rows.hidden, prompts.tokens[:, 0]
    logits, uniform = jax.jit(model.logits)(weights, hidden), state.rows.uniforms[:, 0]
    layers, head, draw = jax.jit(model.decode), jax.jit(model.logits), jax.jit(nucleus.draw)
    keep = jax.jit(filters.apply, static_argnums=1)
    cases = {
        "layers": lambda: layers(weights, state.cache, token, jnp.int32(config.new // 2)),
        "head": lambda: head(weights, hidden),
        "filter": lambda: keep(logits, spec),
        "draw": lambda: draw(logits, uniform),
    }
    for steps in CHUNKS:
        cases[f"chunk of {steps}"] = lambda steps=steps: decode.advance(
            model, spec, steps, weights, jax.tree.map(jnp.copy, state)
        )
    found = measure.alternate(cases, config.repeats)
    for steps in CHUNKS:
        found[f"chunk of {steps}"]["median_ms_a_step"] = found[f"chunk of {steps}"]["median_ms"] / steps
    print(", ".join(f"{name} {each.get('median_ms_a_step', each['median_ms']):.2f} ms" for name, each in found.items()))
    return found


if __name__ == "__main__":
    main()
