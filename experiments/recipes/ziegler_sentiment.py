"""Ziegler et al. 2019, "Fine-tuning language models from human preferences": continue a text with positive sentiment.

    python -m experiments.recipes.ziegler_sentiment --out runs/recipes/ziegler           # a stand-in, a hundredth of the run
    python -m experiments.recipes.ziegler_sentiment --preset published --demonstrations books.jsonl --comparisons labels.jsonl

Settings: the authors' code, openai/lm-human-preferences at 1ab856d, launch.py (`books_task`, `sentiment`) and train_policy.py;
sections 2.1 and 2.2 of the paper. Other than there: responses end at EOS (theirs at the first "." after 16 tokens), a label
compares two responses (theirs chooses of four), and a small model trained here stands for GPT-2.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from experiments import stage
from experiments.recipes import stages
from jaxrlhf.algorithms import ppo, shaping
from jaxrlhf.training.optimizer import OptimizerConfig

ADAM = OptimizerConfig(
    schedule="linear",
    warmup_fraction=0.0,
    final_fraction=0.0,
    clip_norm=None,
    b2=0.999,
    epsilon=1e-5,
    epsilon_style="tensorflow",
)

RECIPE = stages.Recipe(
    out=Path("runs/recipes/ziegler_sentiment"),
    query=64,
    sft=stages.Supervised(examples=0, batch=32, optimizer=ADAM),  # the policy starts as the language model itself
    reward_model=stages.Supervised(examples=4_992, batch=32, optimizer=stages.rate(ADAM, 5e-5)),
    normalise="policy",
    ppo=stages.Policy(
        episodes=1_000_000,
        batch=512,
        sampling=stage.Sampling(temperature=0.7, max_tokens=24, min_tokens=0),
        algorithm=ppo.Config(
            kl_coef=0.15,
            kl_target=6.0,
            kl_horizon=10_000.0,
            gamma=1.0,
            lam=0.95,
            clip=0.2,
            value_clip=0.2,
            value_coef=0.1,
            score=shaping.Config(missing_eos="replace", missing_eos_penalty=1.0),
            whiten_rewards=True,
            epochs=4,
            minibatches=1,
        ),
        optimizer=stages.rate(ADAM, 1e-5),
    ),
)

OPENINGS = (
    "the old man opened the door and",
    "in the morning she",
    "they walked to the sea where he",
    "when the letter came she",
)
GOOD = ("smiled with joy", "felt a warm happy peace", "laughed and loved the day", "thanked the kind people")
BAD = ("wept in pain", "felt a cold angry fear", "cursed and hated the day", "lost the last of hope")


def stand_in(count: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Sentences that end well or badly; of two endings the happier one is preferred."""
    draw = np.random.default_rng(seed)

    def one_of(choices: tuple[str, ...]) -> str:
        return choices[draw.integers(len(choices))]

    texts = [{"prompt": one_of(OPENINGS), "response": f" {one_of(GOOD + BAD)}."} for _ in range(count)]
    pairs = [{"prompt": one_of(OPENINGS), "chosen": f" {one_of(GOOD)}.", "rejected": f" {one_of(BAD)}."} for _ in range(count)]
    return texts, pairs


if __name__ == "__main__":
    stages.main(RECIPE, stand_in, sys.modules["__main__"].__doc__ or "", scale=1e-2)
