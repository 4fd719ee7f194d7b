"""Sums of two numbers of two digits: a task whose answers can be checked, with demonstrations by careless people.

Generated, nothing is read. The split is by unordered pairs of operands: a sum that is held out was never trained on, in
either order.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np

LOW, HIGH = 10, 99  # operands, both ends included
HELD_OUT = 512  # of the 4,095 unordered pairs


def problems(split: Literal["train", "held_out"], seed: int = 0) -> list[dict[str, Any]]:
    """Rows {"prompt": "37+58=", "answer": "95", "left": 37, "right": 58}, in an order drawn by `seed`, as the split is.

    `held_out`: 512 pairs of operands, each in one order. `train`: all other pairs, in both orders. Keep `seed` the same
    wherever a model is trained or judged, else what is held out here is trained on there.
    """
    draw = np.random.default_rng(seed)
    pairs = np.array(list(itertools.combinations_with_replacement(range(LOW, HIGH + 1), 2)))
    pairs = pairs[draw.permutation(len(pairs))]
    turned = draw.random(len(pairs)) < 0.5
    pairs[turned] = pairs[turned, ::-1]
    if split == "train":
        pairs = pairs[HELD_OUT:]
        both = np.concatenate([pairs, pairs[pairs[:, 0] != pairs[:, 1], ::-1]])
        pairs = both[draw.permutation(len(both))]
    else:
        pairs = pairs[:HELD_OUT]
    return [
        {"prompt": f"{left}+{right}=", "answer": str(left + right), "left": left, "right": right}
        for left, right in pairs.tolist()
    ]


def without_carry(left: int, right: int) -> int:
    """What one gets who drops every carry, the last one too: 57 + 68 = 15. Right where no column reaches ten: 24 % of sums."""
    return (left // 10 + right // 10) % 10 * 10 + (left + right) % 10


def demonstrations(count: int, careless: float, seed: int) -> list[tuple[str, str]]:
    """(prompt, answer) of `count` training problems, drawn with replacement; a share `careless` is answered without carries.

    Who learns from them can do both, and by the most probable answer does as most people did.

    Raises:
        ValueError: count < 1, or a share outside [0, 1].
    """
    if count < 1 or not 0 <= careless <= 1:
        raise ValueError(f"demonstrations(count={count}, careless={careless}): need count >= 1 and careless in [0, 1]")
    rows, draw = problems("train"), np.random.default_rng(seed)
    chosen, dropped = draw.integers(len(rows), size=count), draw.random(count) < careless
    return [
        (row["prompt"], str(without_carry(row["left"], row["right"])) if drop else row["answer"])
        for row, drop in zip((rows[i] for i in chosen), dropped, strict=True)
    ]
