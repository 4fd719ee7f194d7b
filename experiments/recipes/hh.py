"""Helpful and harmless dialogue: Bai et al. 2022, "Training a helpful and harmless assistant with RLHF".

    python -m experiments.recipes.hh --out runs/recipes/hh                    # a stand-in, a fiftieth of the run
    python -m experiments.recipes.hh --preset published --demonstrations chosen.jsonl --comparisons hh.jsonl

The KL coefficient (0.001), one epoch for the preference model and about 160,000 comparisons are the paper's by second-hand
accounts, not checked against it. PPO and fine-tuning are CarperAI/trlx's published run on the same data:
examples/hh/configs/ppo_hh_6B.yml (83412fe) and sft_hh.yml (05ec02f). Batch and learning rate of the preference model are
ours. Other than there: the score is not divided by its
running deviation (it is normalised once), all layers train, and a small model trained here stands for the 6 billion.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np

from experiments import stage
from experiments.recipes import stages
from jaxrlhf.algorithms import ppo, shaping
from jaxrlhf.training.optimizer import OptimizerConfig

ADAMW = OptimizerConfig(schedule="constant", warmup_fraction=0.0, clip_norm=None, b2=0.95, epsilon=1e-8, weight_decay=1e-6)

RECIPE = stages.Recipe(
    out=Path("runs/recipes/hh"),
    query=1_952,  # of 2,048 with the response
    model=dataclasses.replace(stages.MODEL, max_length=2_048),
    sft=stages.Supervised(examples=40_000, batch=4, optimizer=stages.rate(ADAMW, 1e-6)),
    reward_model=stages.Supervised(examples=160_000, batch=32, optimizer=stages.rate(ADAMW, 1e-5)),  # both ours
    normalise="policy",
    ppo=stages.Policy(
        episodes=6_000,  # 6,000 updates: 64 on each 64 answers
        batch=64,
        sampling=stage.Sampling(temperature=1.0, max_tokens=96, min_tokens=0),
        algorithm=ppo.Config(
            kl_coef=0.001,
            gamma=1.0,
            lam=0.95,
            clip=0.2,
            value_clip=0.2,
            value_coef=1.0,
            score=shaping.Config(clip=20.0, missing_eos_penalty=0.0),
            epochs=4,
            minibatches=16,
        ),
        optimizer=stages.rate(ADAMW, 8e-6),
    ),
)

ASKED = ("bake bread", "fix a bike", "learn the piano", "grow tomatoes", "write a letter")
HELP = ("first you need a plan, then start with small steps.", "here is how: prepare well, and take your time.")
NO_HELP = ("i do not know.", "why would you want that?", "go away.")


def stand_in(count: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Questions: an answer that helps is preferred; only half of the demonstrations do."""
    draw = np.random.default_rng(seed)

    def one_of(choices: tuple[str, ...]) -> str:
        return choices[draw.integers(len(choices))]

    def dialogue() -> tuple[str, str, str]:
        what = one_of(ASKED)
        return f"\n\nHuman: how do i {what}?\n\nAssistant:", f" to {what}, {one_of(HELP)}", f" {one_of(NO_HELP)}"

    dialogues = [dialogue() for _ in range(count)]
    texts = [{"prompt": prompt, "response": both[draw.integers(2)]} for prompt, *both in dialogues]
    pairs = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in (dialogue() for _ in range(count))]
    return texts, pairs


if __name__ == "__main__":
    # 64 updates on each batch: at a hundred times the published rate the answers came apart.
    stages.main(RECIPE, stand_in, sys.modules["__main__"].__doc__ or "", scale=2e-2, faster=10.0)
