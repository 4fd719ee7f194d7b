"""Tunix's sampler as a contender of benchmarks/generate.py, in an environment of its own.

Reads the settings as JSON from its first argument, makes the model, and generates once for each line of stdin, answering with
a line of JSON: the seconds that it took, and those of all its threads. Prompts are words that are numbers: its sampler takes
text.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time

import jax
import jax_products
import numpy as np
from flax import nnx
from tunix.generate import sampler
from tunix.models.llama3 import model as llama


class Numbers:
    """A tokenizer whose words are ids."""

    def encode(self, text: str, **unused) -> list[int]:
        """The numbers of a text."""
        return [int(word) for word in text.split()]

    def decode(self, ids, **unused) -> str:
        """The text of numbers."""
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        """Begins a prompt."""
        return 1

    def eos_id(self) -> int:
        """Would end a response."""
        return 2

    def pad_id(self) -> int:
        """Fills a row."""
        return 0


def main() -> None:
    """Answer until stdin ends."""
    settings = json.loads(sys.argv[1])
    width, heads = settings["width"], settings["heads"]
    config = llama.ModelConfig(
        num_layers=settings["layers"],
        vocab_size=settings["vocab"],
        embed_dim=width,
        hidden_dim=settings["mlp_width"],
        num_heads=heads,
        head_dim=width // heads,
        num_kv_heads=heads,
        rope_theta=10_000,
        norm_eps=1e-6,
        weight_tying=True,
    )
    size = settings["prompt"] + settings["new"]
    ours = sampler.Sampler(
        llama.Llama3(config, rngs=nnx.Rngs(0)),
        Numbers(),
        sampler.CacheConfig(cache_size=size, num_layers=config.num_layers, num_kv_heads=heads, head_dim=config.head_dim),
    )
    # Its sampler puts BOS before a prompt: one word less.
    ids = np.random.default_rng(0).integers(3, settings["vocab"], (settings["rows"], settings["prompt"] - 1))
    texts = [" ".join(map(str, row)) for row in ids]
    versions = {name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax")}
    rates = jax_products.rates(settings["products"])
    print(json.dumps({"versions": versions, "threads": len(jax.devices()), "product_rates": rates}), flush=True)
    for seed, _ in enumerate(sys.stdin):
        start, used = time.perf_counter(), time.process_time()
        found = ours(
            texts,
            max_generation_steps=settings["new"],
            max_prompt_length=settings["prompt"],
            return_logprobs=True,
            eos_tokens=[settings["vocab"] + 1],  # never drawn
            temperature=1.0,
            top_p=settings["top_p"],
            seed=seed,
        )
        lengths = {len(row) for row in found.tokens}
        if lengths != {settings["new"]}:
            raise SystemExit(f"responses of {sorted(lengths)} tokens in place of {settings['new']}")
        print(json.dumps({"wall": time.perf_counter() - start, "processor": time.process_time() - used}), flush=True)


if __name__ == "__main__":
    main()
