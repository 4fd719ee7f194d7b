"""Which responses change when the arithmetic does: under tensor parallelism, other meshes, narrow weights and narrow caches.

    python benchmarks/divergence.py --shape tiny --rows 64 --new 128

A response is a function of its uniform numbers and of the logits. Another number of rows a device and tensor parallelism sum in
another order, bfloat16 and int8 round. Where that moves a border between two tokens past the
uniform number, another token is drawn, and the row goes its own way from there. Reported of each way: the share of rows that
differ from the plain one (float32, one device) anywhere, the share of tokens at which one first does (the chance of a step to
diverge), and the gap of the log-probs before that. Nothing is timed. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import generate as shapes
import jax
import measure
import numpy as np

from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Rollout
from jaxrlhf.models import transformer
from jaxrlhf.models.model import CacheConfig
from jaxrlhf.sampling import generate

WAYS: dict[str, tuple[MeshConfig, str, CacheConfig]] = {  # mesh, type of the products' operands, cache
    "plain": (MeshConfig(data=1), "float32", CacheConfig()),
    "data=8": (MeshConfig(data=8), "float32", CacheConfig()),
    "fsdp=8": (MeshConfig(data=1, fsdp=8), "float32", CacheConfig()),
    "tensor=2": (MeshConfig(data=1, tensor=2), "float32", CacheConfig()),
    "tensor=4": (MeshConfig(data=1, tensor=4), "float32", CacheConfig()),
    "data=2, fsdp=2, tensor=2": (MeshConfig(data=2, fsdp=2, tensor=2), "float32", CacheConfig()),
    "bfloat16 products": (MeshConfig(data=1), "bfloat16", CacheConfig()),
    "bfloat16 products, tensor=4": (MeshConfig(data=1, tensor=4), "bfloat16", CacheConfig()),
    "bfloat16 cache": (MeshConfig(data=1), "float32", CacheConfig("bfloat16")),
    "int8 cache": (MeshConfig(data=1), "float32", CacheConfig("int8")),
}


def main() -> None:
    """Sample in all ways and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128, help="tokens of a response")
    parser.add_argument(
        "--sharpness", type=float, default=4.0, help="the head's weights times this: logits of a fresh model are flat"
    )
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    found = {name: sampled(config, *way) for name, way in WAYS.items()}
    results = {name: compare(found["plain"], each) for name, each in found.items() if name != "plain"}
    for name, result in results.items():
        print(
            f"{name}: {result['rows_that_diverge']:.3f} of rows, {result['chance_a_token']:.1e} a token; "
            f"log-probs apart by {result['logprob_gap_mean']:.1e} on average, {result['logprob_gap_max']:.1e} at most"
        )
    measure.write(measure.head("divergence", vars(config)) | {"results": results}, config.result)


def sampled(config: argparse.Namespace, mesh_config: MeshConfig, dtype: str, cache: CacheConfig) -> Rollout:
    """Responses of one model, made in this way."""
    model, params, shape = shapes.built(config.shape, config.prompt + config.new, dtype)
    params = params | {"embed": params["embed"] * config.sharpness} if shape.tied_head else params
    prompts = shapes.prompts_of(config.rows, config.prompt, shape.vocab_size)
    count = abs(mesh_config.data) * mesh_config.fsdp * mesh_config.tensor
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:count])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(transformer.param_specs(shape), mesh))
        given, options = sharding.shard_batch(prompts, mesh), generate.Options(cache=cache)
        return jax.device_get(
            generate.generate(model, placed, given, shapes.spec(config.new), jax.random.key(2), options=options)
        )


def compare(plain: Rollout, other: Rollout) -> dict[str, Any]:
    """Where rows first differ, and how far log-probs are apart before."""
    width = plain.logprobs.shape[1]
    begin = int(plain.prompt_len[0])
    differing = plain.tokens[:, begin:] != other.tokens[:, begin:]
    first = np.where(differing.any(axis=1), differing.argmax(axis=1), width)
    before = np.arange(width) < first[:, None]
    gap = np.abs(plain.logprobs - other.logprobs)[before]
    return {
        "rows_that_diverge": float((first < width).mean()),
        "chance_a_token": float((first < width).sum() / (before.sum() + (first < width).sum())),
        "first_difference_median": float(np.median(first[first < width])) if (first < width).any() else None,
        "logprob_gap_mean": float(gap.mean()),
        "logprob_gap_max": float(gap.max()),
        "surprise_mean": float(-plain.logprobs.mean()),
    }


if __name__ == "__main__":
    main()
