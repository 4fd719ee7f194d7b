"""Over-optimisation: does the outside judgement turn down while the proxy still rises?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxrlhf.evaluation import plots


def curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows (`kl` in nats a response, `proxy`, judges, ...) with `sqrt_kl`, the distance of Gao et al. 2022, in step order.

    A sampled KL near 0 may come out below it; its root is taken as 0.
    """
    return [{**row, "sqrt_kl": math.sqrt(max(row["kl"], 0.0))} for row in rows]


class Peak(NamedTuple):
    """The largest fall of a judge's curve from what was its peak until then."""

    peak: float
    index: int  # row of the peak
    low: float  # the lowest after it, in the largest fall
    low_index: int
    final: float  # at the end of the curve, where it may have risen again
    drop: float  # (peak - low) / |peak|; 0 where the curve never falls
    proxy_rise: float  # proxy at the low minus proxy at the peak: above 0 while drop > 0 is over-optimisation


def peak_and_drop(rows: Sequence[Mapping[str, Any]], judge: str, proxy: str = "proxy") -> Peak:
    """The largest fall of `judge` from its highest value so far, and what the proxy did meanwhile.

    Raises:
        ValueError: no row.
    """
    if not rows:
        raise ValueError("no row to find a peak in: evaluate the policy at several steps")
    values = np.array([row[judge] for row in rows], np.float64)
    highest = np.maximum.accumulate(values)
    low_index = int((highest - values).argmax()) if (highest > values).any() else len(values) - 1
    index = int(values[: low_index + 1].argmax())
    peak, low = float(values[index]), float(values[low_index])
    drop = (peak - low) / abs(peak) if peak else 0.0
    return Peak(peak, index, low, low_index, float(values[-1]), drop, float(rows[low_index][proxy] - rows[index][proxy]))


class Fit(NamedTuple):
    """Coefficients of a curve of Gao et al. 2022 and the share of the variance that it explains."""

    a: float
    b: float
    r2: float


def fit(distance: Float[np.ndarray, " n"], gain: Float[np.ndarray, " n"], best_of_n: bool = False) -> Fit:
    """Least squares of gain = d (a - b log d) for reinforcement learning, d (a - b d) for best-of-n; d = sqrt(KL).

    `gain` is the judgement minus that at d = 0. Points at d = 0 carry nothing and are left out.
    Source: Gao, Schulman and Hilton 2022, "Scaling laws for reward model overoptimization".

    Raises:
        ValueError: fewer than three points with d > 0.
    """
    keep = distance > 0
    d, y = distance[keep], gain[keep]
    if len(d) < 3:
        raise ValueError(f"{len(d)} point(s) away from the start: the curve of two coefficients needs at least 3")
    design = np.stack([d, -d * d if best_of_n else -d * np.log(d)], 1)
    (a, b), *_ = np.linalg.lstsq(design, y, rcond=None)
    residual = y - design @ np.array([a, b])
    spread = float(np.square(y - y.mean()).sum())
    return Fit(float(a), float(b), 1 - float(np.square(residual).sum()) / spread if spread else 0.0)


def fit_curves(curves: Sequence[Sequence[Mapping[str, Any]]], best_of_n: bool = False, judge: str = "gold") -> Fit | None:
    """`fit` to the points of several curves together, each curve's gain counted from its own first row.

    None where fewer than three points lie away from the start.
    """
    points = [(row["sqrt_kl"], row[judge] - rows[0][judge]) for rows in curves for row in rows[1:]]
    distance, gain = np.array(points, np.float64).reshape(-1, 2).T
    return fit(distance, gain, best_of_n) if (distance > 0).sum() >= 3 else None


def fits(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The forms of Gao et al. 2022 fitted to the gold score of each proxy, and of all seeds of a size together (`seeds`).

    Each of `found` has `size`, `proxy` (a seed's number, or the name of an ensemble), `rows` (a curve) and, if PPO drew it,
    `kl_coef`; without, it is best-of-n's. Curves with fewer than three points away from the start are left out.
    """
    groups: dict[tuple, list[Any]] = {}
    for one in found:
        for proxy in (one["proxy"], "seeds") if one["proxy"].isdigit() else (one["proxy"],):
            groups.setdefault((one["size"], proxy, one.get("kl_coef")), []).append(one["rows"])
    fitted = {key: fit_curves(curves, best_of_n=key[2] is None) for key, curves in groups.items()}
    names = ("size", "proxy", "kl_coef")
    return [{**dict(zip(names, key, strict=True)), **fit._asdict()} for key, fit in fitted.items() if fit is not None]


def peaks(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`peak_and_drop` of the gold score of each of `found` (as for `fits`)."""
    names = ("size", "proxy", "kl_coef")
    return [{name: one.get(name) for name in names} | peak_and_drop(one["rows"], "gold")._asdict() for one in found]


def at_distance(rows: Sequence[Mapping[str, Any]], distance: float, judge: str = "gold") -> float:
    """The judge's gain over the start of a curve where it first reaches `distance` (sqrt_kl), on straight lines between rows.

    NaN where it never does. Two ways to press are comparable at equal distance only.
    """
    for before, after in itertools.pairwise(rows):
        reach = after["sqrt_kl"] - before["sqrt_kl"]
        if before["sqrt_kl"] <= distance <= after["sqrt_kl"] and reach > 0:
            share = (distance - before["sqrt_kl"]) / reach
            return float(before[judge] + share * (after[judge] - before[judge]) - rows[0][judge])
    return float("nan")


def at_equal_distance(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Gains in gold score (see `at_distance`) of all proxies of a size, at the largest distance that each of them reached.

    `found` is as for `fits`.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    for one in found:
        groups.setdefault((one["size"], one.get("kl_coef")), {})[one["proxy"]] = one["rows"]
    compared = []
    for (size, kl_coef), curves in groups.items():
        distance = min(max(row["sqrt_kl"] for row in rows) for rows in curves.values())
        gain = {proxy: at_distance(rows, distance) for proxy, rows in curves.items()}
        compared.append({"size": size, "kl_coef": kl_coef, "sqrt_kl": distance, "gain": gain})
    return compared


def chosen_pairs(gold: Float[np.ndarray, "s n"], noise: float, seed: int) -> Float[np.ndarray, "s n n"]:
    """1 where answer i of a set was chosen over j: by the gold score, in a share `noise` against it; equal ones by neither."""
    sets, n = gold.shape
    lead = gold[:, :, None] - gold[:, None, :]
    wrong = np.triu(np.random.default_rng([seed, 1]).random((sets, n, n)) < noise, 1)
    wrong = wrong | wrong.swapaxes(1, 2)
    return (np.where(wrong, -lead, lead) > 0).astype(np.float32)


def chosen_best(gold: Float[np.ndarray, "s n"], noise: float, seed: int) -> Int[np.ndarray, " s"]:
    """The answer of each set with the highest gold score, in a share `noise` of the sets one of the others."""
    random = np.random.default_rng([seed, 2])
    sets, n = gold.shape
    other = random.integers(1, n, sets)
    return ((gold.argmax(1) + np.where(random.random(sets) < noise, other, 0)) % n).astype(np.int32)


def figure(title: str, found: Sequence[Mapping[str, Any]]) -> str:
    """SVG: gold score (marks) and proxy score (faint) against the distance, the mean over the seeds of each size."""
    series = []
    for colour, size in enumerate(dict.fromkeys(one["size"] for one in found)):
        seeds = [one["rows"] for one in found if one["size"] == size and one["proxy"].isdigit()]
        x, gold, proxy = (
            np.mean([[row[key] for row in rows] for rows in seeds], 0).tolist() for key in ("sqrt_kl", "gold", "proxy")
        )
        series += [
            plots.Series(size, x, gold, colour % 4, marks=True),
            plots.Series(f"{size}, proxy", x, proxy, colour % 4, faint=True),
        ]
    return plots.alone(plots.lines(title, series, "\u221aKL to the fine-tuned model (nats)"))
