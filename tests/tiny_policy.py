"""A policy for sums that was not trained, as a folder that scripts start from: small, and made in a second."""

from __future__ import annotations

import pathlib

import jax

from experiments import stage
from jaxrlhf.data import arithmetic
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig


def write(folder: pathlib.Path) -> pathlib.Path:
    """The folder, written."""
    pairs = arithmetic.demonstrations(200, 0.5, 1)
    tokenizer = tokenizers.train((prompt for prompt, _ in pairs), 259)
    config = TransformerConfig(tokenizer.vocab_size, 16, 1, 2, 2, 8, 32, 16)
    stage.save(folder, "policy", transformer.build(config).init(jax.random.key(0)), config, tokenizer)
    return folder
