"""Whole generations against those of peers, every contender writing the same number of tokens a row, log-probs kept.

    python benchmarks/generate.py --shape small --transformers VENV/bin/python --tunix VENV/bin/python \
        --result benchmarks/results/DATE-generate-small.json
    python benchmarks/generate.py --shape small --shared          # one prompt read once for its samples, against once for each

Peers run in environments of their own, as processes that wait while another contender's turn is timed: benchmarks/peers/. All
have a Llama of the same widths with random weights, temperature 1, top-p 0.9 unless said, float32. What bounds a generation
on a CPU are its weight products: their rate at this number of rows is measured in every contender's own library, and beside
each ratio stands the share that each side reaches, and the most that the ratio could be here ("bound by products"). The last
line of stdout is one JSON document.
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
UNROLLED = {"scan": False, "remat": "none"}  # trains fastest on a CPU; the peers do not recompute either


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
    parser.add_argument("--repeats", type=int, default=6, help="even, so that every second round runs backwards")
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    found = shared_prompts(config) if config.shared else against_peers(config)
    measure.write(measure.head("generate", vars(config)) | {"machine": measure.machine(config.repeats), **found}, config.result)


def against_peers(config: argparse.Namespace) -> dict[str, Any]:
    """Ours without a filter, with top-p and greedy; the peers with top-p."""
    model, params, shape = built(config.shape, config.prompt + config.new)
    prompts = prompts_of(config.rows, config.prompt, shape.vocab_size)
    rules = {"top_p": {"top_p": config.top_p}, "no filter": {}, "greedy": {"greedy": True}}
    cases: dict[str, Callable[[], Any]] = {
        f"jaxrlhf, {name}": ours(model, params, prompts, spec(config.new, **given)) for name, given in rules.items()
    }
    settings = vars(shape) | {"rows": config.rows, "prompt": config.prompt, "new": config.new, "top_p": config.top_p}
    settings["vocab"] = shape.vocab_size
    products = settings["products"] = products_of(config.shape, (config.rows, config.prompt, config.new), config.rows)
    own = measure.rates(products)
    peers = {
        name: measure.Peer(f"{name}_generate", getattr(config, name), settings)
        for name in ("transformers", "tunix")
        if getattr(config, name)
    }
    cases |= {name: lambda peer=peer: measure.times(peer.run()) for name, peer in peers.items()}
    results = measure.alternate(cases, config.repeats)
    for peer in peers.values():
        peer.close()
    for result in results.values():
        result["tokens_per_s"] = 1e3 * config.rows * config.new / result["median_ms"]
    found = measure.against(results, products, own, {name: peer.about for name, peer in peers.items()})
    measure.tell(results, found)
    found["ratios"]["top_p over greedy"] = results["jaxrlhf, top_p"]["median_ms"] / results["jaxrlhf, greedy"]["median_ms"]
    return {
        "model": vars(shape) | {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params))},
        "peers": {name: peer.about for name, peer in peers.items()},
        "equal_work": dict.fromkeys(peers, "jaxrlhf, top_p"),
        "results": results,
        **found,
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


def products_of(
    name: str, sizes: tuple[int, int, int], prompts: int, part: int = 0, passes: dict[str, int] | None = None
) -> measure.Products:
    """What a generation, or an iteration that scores and learns from it, asks of weight products; `sizes`: rows, prompt, new.

    Prompts are read once each, every token is drawn once. `passes` are those over the rows after that, `part` rows at a time:
    forward passes of layers and of the head that score them (`score`, `score_heads`), and models of each that are updated
    (`update`, `update_heads`). A backward pass is two forward; nothing is recomputed; heads only at responses; attention and
    the products of width one are left out.
    """
    width, layers, _, mlp, vocab = SHAPES[name]
    rows, prompt, new = sizes
    layer, head = 2 * layers * (4 * width * width + 3 * width * mlp), 2 * width * vocab
    found = {
        "prompts": {"shape": [prompts * prompt, width, mlp], "flops": prompts * prompt * layer},
        "decode": {"shape": [rows, width, mlp], "flops": rows * new * layer},
        "decode heads": {"shape": [rows, width, vocab], "flops": rows * new * head},
    }
    if passes:
        forward, heads = passes["score"] + 3 * passes["update"], passes["score_heads"] + 3 * passes["update_heads"]
        length = prompt + new
        found["learn"] = {"shape": [part * length, width, mlp], "flops": rows * length * layer * forward}
        found["learn heads"] = {"shape": [part * new, width, vocab], "flops": rows * new * head * heads}
    return found


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


if __name__ == "__main__":
    main()
