"""What the tests of the service share: tiny policies as folders, and the service over one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib

import jax

from experiments import serve, stage
from jaxrlhf.data import arithmetic
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.feedback import limits
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig

FREE = limits.Limits(body=1_048_576, rate=1e6, burst=10**6)  # a test asks faster than a person
SAMPLING = stage.Sampling(temperature=1.0, max_tokens=24, min_tokens=0)


def policy(folder: pathlib.Path, seed: int, context: int = 56) -> pathlib.Path:
    """A language model of random weights, as a stage writes it."""
    pairs = arithmetic.demonstrations(200, 0.5, 1)
    tokenizer = tokenizers.train((prompt for prompt, _ in pairs), 259)
    config = TransformerConfig(tokenizer.vocab_size, 16, 1, 2, 2, 8, 32, context)
    stage.save(folder, "policy", transformer.build(config).init(jax.random.key(seed)), config, tokenizer)
    return folder


def promote(link: pathlib.Path, folder: pathlib.Path) -> None:
    """Let the symlink lead to another folder, in one step."""
    new = link.with_name(f"{link.name}.new")
    new.symlink_to(folder, target_is_directory=True)
    os.replace(new, link)


def config(folder: pathlib.Path, **more) -> serve.Config:
    """Settings of a small service on any free port."""
    given = serve.Config(folder, sampling=SAMPLING, slots=8, chunk=4, port=0, limits=FREE)
    return dataclasses.replace(given, **more)


@contextlib.contextmanager
def service(folder: pathlib.Path, **more):
    """A small service: its address and engine."""
    with serve.serving(config(folder, **more)) as (address, engine):
        yield address, engine
