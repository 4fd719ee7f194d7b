"""TL;DR summaries with Pythia: Huang et al. 2024, "The N+ implementation details of RLHF with PPO", after Stiennon et al. 2020.

    python -m experiments.recipes.tldr --out runs/recipes/tldr                # a stand-in, a thousandth of the run
    python -m experiments.recipes.tldr --preset published --demonstrations tldr.jsonl --comparisons feedback.jsonl

Settings: the authors' code, vwxyzjn/summarize_from_feedback_details, sft.py, reward.py (1d6d8ee) and ppo.py (3f14a17); the
paper's own tables were not compared. Other than there: sampling stops at EOS (theirs goes on to 53 tokens and cuts
afterwards), and a small model trained here stands for Pythia.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from experiments import stage
from experiments.recipes import stages
from jaxrlhf.algorithms import ppo, shaping
from jaxrlhf.training.optimizer import OptimizerConfig

ADAMW = OptimizerConfig(
    learning_rate=3e-6, schedule="cosine", warmup_fraction=0.0, final_fraction=0.0, clip_norm=None, b2=0.999, epsilon=1e-5,
    weight_decay=0.01,
)  # fmt: skip

RECIPE = stages.Recipe(
    out=Path("runs/recipes/tldr"),
    query=512,
    sft=stages.Supervised(examples=116_722, batch=128, optimizer=ADAMW),
    reward_model=stages.Supervised(examples=92_832, batch=64, optimizer=ADAMW),
    normalise="demonstrations",
    ppo=stages.Policy(
        episodes=1_000_000,
        batch=512,
        sampling=stage.Sampling(temperature=0.7, max_tokens=53, min_tokens=0),
        algorithm=ppo.Config(
            kl_coef=0.05,
            gamma=1.0,
            lam=0.95,
            clip=0.2,
            value_clip=0.2,
            value_coef=0.1,
            score=shaping.Config(missing_eos="replace", missing_eos_penalty=1.0),
            whiten_rewards=False,
            epochs=4,
            minibatches=1,
        ),
        optimizer=ADAMW,
        critic="reward",
    ),
)

WHO = ("my brother", "my boss", "my friend", "my neighbour", "my roommate")
WHAT = ("ate my lunch", "sold my bike", "lost my keys", "broke my phone", "painted my door")
FILLER = ("it was raining that day.", "i had slept badly.", "we had met years before.", "the bus was late again.")


def stand_in(count: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Posts in which one thing happens: a summary that names it is preferred; only half of the demonstrations do."""
    draw = np.random.default_rng(seed)

    def one_of(choices: tuple[str, ...]) -> str:
        return choices[draw.integers(len(choices))]

    def post() -> tuple[str, str, str]:
        who, what, other = one_of(WHO), one_of(WHAT), one_of(FILLER)
        said = f"{one_of(FILLER)} {who} {what}. {one_of(FILLER)}"
        text = f"SUBREDDIT: r/advice\n\nTITLE: what should i do?\n\nPOST: {said}\n\nTL;DR:"
        return text, f" {who} {what}", f" {other}"

    posts = [post() for _ in range(count)]
    texts = [{"prompt": prompt, "response": both[draw.integers(2)]} for prompt, *both in posts]
    pairs = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in (post() for _ in range(count))]
    return texts, pairs


if __name__ == "__main__":
    stages.main(RECIPE, stand_in, sys.modules["__main__"].__doc__ or "", scale=1e-3)
