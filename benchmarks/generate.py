"""Whole generations against those of peers, every contender writing the same number of tokens a row, log-probs kept.

    python benchmarks/generate.py --shape small --transformers VENV/bin/python --tunix VENV/bin/python \
        --result benchmarks/results/DATE-generate-small.json
    python benchmarks/generate.py --shape small --shared          # one prompt read once for its samples, against once for each

Peers run in environments of their own, as processes that wait while another contender's turn is timed: benchmarks/peers/. All
have a Llama of the same widths with random weights, temperature 1, top-p 0.9 unless said, float32. What bounds ours on a CPU
are its weight products; their rate at this number of rows is measured in the same run. The last line of stdout is one JSON
document.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure

from jaxrlhf.core.types import Prompts, Rollout, SamplingSpec
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.model import Model
from jaxrlhf.sampling import generate

SHAPES = {  # width, layers, heads, mlp width, vocabulary
    "tiny": (128, 4, 4, 512, 512),
    "small": (512, 6, 8, 1408, 8192),
    "gpt2": (768, 12, 12, 2048, 50257),
}


def main() -> None:
    """Time all contenders in turn and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a response")
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--transformers", type=Path, help="a Python that has transformers and torch")
    parser.add_argument("--tunix", type=Path, help="a Python that has google-tunix")
    parser.add_argument("--shared", action="store_true", help="64 responses to 16 prompts of 512 tokens, 128 tokens each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    found = shared_prompts(config) if config.shared else against_peers(config)
    measure.write(measure.head("generate", vars(config)) | {"machine": measure.machine(config.repeats), **found}, config.result)


def against_peers(config: argparse.Namespace) -> dict[str, Any]:
    """Ours without a filter, with top-p and greedy; the peers with top-p; and our products alone, at this number of rows."""
    model, params, shape = built(config.shape, config.prompt + config.new)
    prompts = prompts_of(config.rows, config.prompt, shape.vocab_size)
    rules = {"top_p": {"top_p": config.top_p}, "no filter": {}, "greedy": {"greedy": True}}
    cases: dict[str, Callable[[], Any]] = {
        f"jaxrlhf, {name}": ours(model, params, prompts, spec(config.new, **given)) for name, given in rules.items()
    }
    settings = vars(shape) | {"rows": config.rows, "prompt": config.prompt, "new": config.new, "top_p": config.top_p}
    settings["vocab"] = shape.vocab_size
    peers = {
        name: measure.Peer(f"{name}_generate", getattr(config, name), settings)
        for name in ("transformers", "tunix")
        if getattr(config, name)
    }
    cases |= {name: lambda peer=peer: measure.times(peer.run()) for name, peer in peers.items()}
    weights = [jnp.ones((shape.width, shape.mlp_width)) for _ in range(24)]
    x = jnp.ones((config.rows, shape.width))
    cases["products"] = lambda: products(x, weights)
    results = measure.alternate(cases, config.repeats)
    for peer in peers.values():
        peer.close()
    rate = 24 * 2 * config.rows * shape.width * shape.mlp_width / (1e-3 * results["products"]["min_ms"])
    per_layers = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]))
    places = (config.prompt + config.new) * per_layers + config.new * shape.vocab_size * shape.width
    for name, result in results.items():
        if name != "products":
            result["tokens_per_s"] = 1e3 * config.rows * config.new / result["median_ms"]
            result["share_of_product_rate"] = 2 * config.rows * places / rate / (1e-3 * result["median_ms"])
    median = {name: result["median_ms"] for name, result in results.items()}
    ratios = {name: median[name] / median["jaxrlhf, top_p"] for name in peers}
    ratios["top_p over greedy"] = median["jaxrlhf, top_p"] / median["jaxrlhf, greedy"]
    for name, result in results.items():
        print(
            f"{name}: {result['median_ms']:.1f} ms"
            + (f", {median[name] / median['jaxrlhf, top_p']:.2f} x ours" * (name in peers))
        )
    return {
        "model": vars(shape) | {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params))},
        "product_rate_at_these_rows": rate,
        "peers": {name: peer.about for name, peer in peers.items()},
        "results": results,
        "ratios": ratios,
    }


def shared_prompts(config: argparse.Namespace) -> dict[str, Any]:
    """Four samples a prompt, the prompt read once; and each sample with a prompt of its own."""
    model, params, shape = built(config.shape, 512 + 128)
    few = prompts_of(16, 512, shape.vocab_size)
    many = jax.tree.map(lambda x: jnp.repeat(x, 4, axis=0), few)
    rules = spec(128, top_p=config.top_p)
    cases = {"shared": ours(model, params, few, rules, n=4), "repeated": ours(model, params, many, rules)}
    results = measure.alternate(cases, config.repeats)
    ratio = results["repeated"]["median_ms"] / results["shared"]["median_ms"]
    print(", ".join(f"{name} {result['median_ms']:.0f} ms" for name, result in results.items()) + f", {ratio:.2f} x")
    held = {
        name: generate.cache_bytes(model, given, rules, n) for name, given, n in (("shared", few, 4), ("repeated", many, 1))
    }
    return {"model": vars(shape), "cache_bytes": held, "results": results, "ratio": ratio}


def built(name: str, length: int, dtype: Any = "float32") -> tuple[Model, Any, TransformerConfig]:
    """A Llama of this shape with random weights."""
    model, shape = model_of(name, length, dtype)
    return model, model.init(jax.random.key(0)), shape


def model_of(name: str, length: int, dtype: Any = "float32") -> tuple[Model, TransformerConfig]:
    """A Llama of this shape."""
    width, layers, heads, mlp_width, vocab = SHAPES[name]
    shape = TransformerConfig(vocab, width, layers, heads, heads, width // heads, mlp_width, length, dtype=dtype)
    return transformer.build(shape), shape


def prompts_of(rows: int, width: int, vocab: int) -> Prompts:
    """Prompts of random tokens."""
    count = jnp.arange(rows, dtype=jnp.int32)
    tokens = jax.random.randint(jax.random.key(1), (rows, width), 3, vocab)
    return Prompts(tokens=tokens, length=jnp.full_like(count, width), uid=count, row=count)


def spec(new: int, **given: Any) -> SamplingSpec:
    """A distribution without a stop id: every row writes all its tokens."""
    return SamplingSpec(temperature=1.0, max_tokens=new, stop=(), **given)


def ours(model: Model, params: Any, prompts: Prompts, rules: SamplingSpec, n: int = 1) -> Callable[[], Rollout]:
    """One generation, in chunks of 16 steps."""
    options = generate.Options(chunk=16)
    return lambda: generate.generate(model, params, prompts, rules, jax.random.key(2), n, options=options)


@jax.jit
def products(x: jax.Array, weights: list[jax.Array]) -> list[jax.Array]:
    """The rows times each of some weights: what a decode step is made of."""
    return [x @ weight for weight in weights]


if __name__ == "__main__":
    main()
