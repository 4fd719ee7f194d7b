"""Distributions that transformers' logits processors and warpers make, for tests/test_warpers.py.

    python tests/golden/make_warpers.py        # where torch and transformers are installed; writes warpers.npz beside this file

Each case is one next-token distribution of rows that have a prompt and some tokens of a response.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers

CASES = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 60, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.9, "repetition_penalty": 1.4, "top_p": 0.9},
    {"temperature": 1.0, "repetition_penalty": 0.7, "top_k": 25, "min_p": 0.01},
]
ROWS, VOCAB = 6, 200


def main() -> None:
    """Write logits, rows of tokens, and the distribution of each case."""
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(ROWS, VOCAB))).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (ROWS, 20))
    found = {"logits": logits, "tokens": tokens.astype(np.int32), "cases": np.array(json.dumps(CASES))}
    for number, case in enumerate(CASES):
        found[f"probability_{number}"] = distribution(torch.tensor(logits), torch.tensor(tokens), case).numpy()
    found["versions"] = np.array(f"transformers {transformers.__version__}, torch {torch.__version__}")
    np.savez_compressed(Path(__file__).with_name("warpers.npz"), **found)


def distribution(logits: torch.Tensor, tokens: torch.Tensor, case: dict) -> torch.Tensor:
    """Probabilities [B, V], float32, the processors in the order in which `generate` puts them."""
    chain = transformers.LogitsProcessorList()
    if "repetition_penalty" in case:
        chain.append(transformers.RepetitionPenaltyLogitsProcessor(case["repetition_penalty"]))
    chain.append(transformers.TemperatureLogitsWarper(case["temperature"]))
    if "top_k" in case:
        chain.append(transformers.TopKLogitsWarper(case["top_k"]))
    if "top_p" in case:
        chain.append(transformers.TopPLogitsWarper(case["top_p"]))
    if "min_p" in case:
        chain.append(transformers.MinPLogitsWarper(case["min_p"]))
    return torch.softmax(chain(tokens, logits.clone()), -1)


if __name__ == "__main__":
    main()
