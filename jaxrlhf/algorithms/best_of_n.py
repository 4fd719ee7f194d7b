"""Best-of-n: what choosing among n samples by a score gives, without bias from m >= n samples, and how far it goes.

Choosing needs no training, so every algorithm that trains should be held against it at the same KL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float


def kl(n: int) -> float:
    """Upper bound, in nats, of the KL of best-of-n from the policy it draws from: log n - (n - 1) / n.

    Exact where no two samples are equal, as with continuous outcomes.
    Source: Stiennon et al. 2020, appendix G.3; Beirami et al. 2024 show that it is a bound.
    """
    return math.log(n) - (n - 1) / n


def weights(scores: Float[np.ndarray, "p m"], n: int) -> Float[np.ndarray, "p m"]:
    """Probability that each of a prompt's m samples is the best by score of n drawn from the m without replacement.

    The weighted mean of any figure of the samples is an unbiased estimate of best-of-n's. Equal scores are broken by order.
    Source: Nakano et al. 2021 (WebGPT), the unbiased estimator of best-of-n; the same order statistics as pass@k of Chen et
    al. 2021, equation 1.

    Raises:
        ValueError: n is not between 1 and m.
    """
    m = scores.shape[1]
    if not 1 <= n <= m:
        raise ValueError(f"best of {n} needs n between 1 and the {m} samples drawn a prompt")
    # The sample of rank i (0: lowest) wins if it is drawn and the n - 1 others come from the i below it.
    by_rank = np.array([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)])
    ranks = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1)
    return by_rank[ranks]


def table(
    scores: Float[np.ndarray, "p m"], values: Mapping[str, np.ndarray], sizes: Sequence[int] = (1, 2, 4, 8, 16)
) -> list[dict[str, float | int]]:
    """A row for each n of `sizes`: n, KL bound, and the mean over prompts of each value of best-of-n by `scores`.

    `scores[i, j]` is the proxy's of sample j of prompt i; each of `values` is [prompts, samples] as well: judges' scores,
    a gold reward's, `win_rate.outcomes` against a baseline, lengths.
    """
    scores = np.asarray(scores, np.float64)
    rows = []
    for n in sizes:
        drawn = weights(scores, n)
        means = {name: float((drawn * value).sum(1).mean()) for name, value in {"proxy": scores, **values}.items()}
        rows.append({"n": n, "kl": kl(n), **means})
    return rows
