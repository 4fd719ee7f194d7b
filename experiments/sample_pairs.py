"""Pairs of answers for people to choose from, drawn by nucleus sampling, into a feedback store.

    python -m experiments.sample_pairs --policies runs/demo/ppo/model runs/demo/sft/model --out runs/demo/sample_pairs

The first policy answers `count` prompts twice; with a second policy, `against` more prompts are answered once by each.
Prompts are the first words of training reviews.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from experiments import stage
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import human_sentiment, pipeline
from jaxrlhf.feedback import store
from jaxrlhf.sampling import generate
from jaxrlhf.training import cli
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    policies: tuple[Path, ...] = (Path("runs/demo/ppo/model"), Path("runs/demo/sft/model"))
    store: Path = Path("runs/demo/feedback.sqlite")
    out: Path = Path("runs/demo/sample_pairs")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    count: int = 2048  # prompts answered twice by the first policy
    against: int = 1024  # prompts answered by the first and by the second
    batch: int = 256  # prompts at a time
    sampling: stage.Sampling = stage.Sampling(temperature=1.0, top_p=0.9)  # pairs that differ are worth asking about


def run(config: Config) -> dict[str, Any]:
    """Draw the pairs and add them to `config.store`; pairs of equal answers are left out."""
    mesh = stage.mesh(config.mesh, batch=config.batch)
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        with jax.set_mesh(mesh), contextlib.closing(store.open_store(config.store)) as db:
            writers = [stage.load(folder, mesh) for folder in config.policies]
            if not 1 <= len(writers) <= 2:
                raise ValueError(f"{len(writers)} policies: give one, or two to compare")
            first, last = writers[0], writers[-1]
            spec = stage.spec(config.sampling, first.tokenizer)
            rows = first.tokenizer.encode_batch([pipeline.clean(r.text) for r in human_sentiment.reviews("train")])
            prompts = pipeline.prompt_batches(
                pipeline.cut_prompts(rows, first.tokenizer, config.seed), config.batch, config.seed
            )
            own, mixed = (-(-count // config.batch) for count in (config.count, config.against * (len(writers) > 1)))
            drawn = added = 0
            for i in run.steps(0, own + mixed, "sample pairs"):
                batch, key = sharding.shard_batch(prompts[i], mesh), jax.random.key(config.seed)
                if i < own:
                    prompt, answers = answer(first, batch, spec, key, 2)
                    a, b, other = answers[::2], answers[1::2], config.policies[0]
                else:
                    (prompt, a), (_, b) = (answer(writer, batch, spec, key, 1) for writer in (first, last))
                    other = config.policies[-1]
                pairs = [
                    store.Pair(p, x, y, str(config.policies[0]), str(other), json.dumps(dataclasses.asdict(spec)))
                    for p, x, y in zip(prompt, a, b, strict=True)
                    if x != y
                ]
                drawn, added = drawn + len(prompt), added + store.add_pairs(db, pairs)
        return run.done({"drawn": drawn, "distinct": added, "top_p": config.sampling.top_p})


def answer(writer: stage.Trained, prompts: Any, spec: Any, key: jax.Array, n: int) -> tuple[list[str], list[str]]:
    """The prompts once each, and n answers to each of them."""
    rollout = generate.generate(writer.model, writer.params, prompts, spec, key, n, options=stage.ONCE)
    starts, responses = stage.texts(rollout, writer.tokenizer)
    return starts[::n], responses


PRESETS = {"default": Config(), "smoke": Config(count=64, against=32, batch=32)}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
