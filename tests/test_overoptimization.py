"""The gold reward's choices in the over-optimisation study, and how its curves are gathered and compared."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import overoptimization as study
from jaxrlhf.evaluation import overoptimization, plots


def test_pairs_follow_the_gold_score():
    gold = np.array([[0.3, -1.0, 0.3], [2.0, 1.0, 0.0]], np.float32)
    chosen = overoptimization.chosen_pairs(gold, noise=0.0, seed=1)
    np.testing.assert_array_equal(chosen[0], [[0, 1, 0], [0, 0, 0], [0, 1, 0]])  # equal scores are no choice
    np.testing.assert_array_equal(chosen[1], [[0, 1, 1], [0, 0, 1], [0, 0, 0]])


def test_a_share_of_the_choices_goes_wrong():
    gold = np.random.default_rng(0).normal(size=(4000, 3)).astype(np.float32)
    right, chosen = overoptimization.chosen_pairs(gold, 0.0, 1), overoptimization.chosen_pairs(gold, 0.2, 1)
    assert (chosen + chosen.swapaxes(1, 2) == right + right.swapaxes(1, 2)).all()  # each pair is chosen from once
    wrong = 1 - (right * chosen).sum() / right.sum()
    assert wrong == pytest.approx(0.2, abs=4 * (0.16 / 12_000) ** 0.5)  # 4 sigma
    best, kept = overoptimization.chosen_best(gold, 0.0, 1), overoptimization.chosen_best(gold, 0.2, 1)
    np.testing.assert_array_equal(best, gold.argmax(1))
    assert (best != kept).mean() == pytest.approx(0.2, abs=4 * (0.16 / 4000) ** 0.5)


def curve(start: float, a: float, b: float, best: bool) -> list[dict]:
    d = np.linspace(0, 4, 5)
    gain = d * (a - b * d) if best else d * (a - b * np.log(np.maximum(d, 1e-9)))
    return [{"sqrt_kl": x, "gold": start + y, "proxy": 2 * x} for x, y in zip(d.tolist(), gain.tolist(), strict=True)]


def test_seeds_are_fitted_alone_and_all_of_a_size_together():
    best = [{"size": "small", "proxy": str(m), "rows": curve(m, 0.5, 0.1, True)} for m in range(2)]
    best.append({"size": "small", "proxy": "worst", "rows": curve(0, 0.7, 0.1, True)})
    slopes = (0.3, 0.5)  # of the form the fit of both together is the mean, as they have the same distances
    pressed = [{"size": "large", "proxy": str(m), "kl_coef": 0.0, "rows": curve(m, slopes[m], 0.3, False)} for m in range(2)]
    short = {"size": "large", "proxy": "0", "rows": curve(0, 0.5, 0.1, True)[:3]}  # two points away from the start
    found = overoptimization.fits([*best, *pressed, short])
    expected = {
        ("small", "0", None): (0.5, 0.1),
        ("small", "1", None): (0.5, 0.1),
        ("small", "seeds", None): (0.5, 0.1),
        ("small", "worst", None): (0.7, 0.1),
        ("large", "0", 0.0): (0.3, 0.3),
        ("large", "1", 0.0): (0.5, 0.3),
        ("large", "seeds", 0.0): (0.4, 0.3),
    }
    fitted = {(row["size"], row["proxy"], row["kl_coef"]): (row["a"], row["b"]) for row in found}
    assert fitted == {key: pytest.approx(value) for key, value in expected.items()}
    assert all((row["r2"] == pytest.approx(1.0)) == (row["size"] == "small" or row["proxy"] != "seeds") for row in found)


def test_the_peak_of_each_proxy():
    rows = [{"sqrt_kl": float(d), "gold": g, "proxy": float(d)} for d, g in enumerate([0.0, 0.5, 0.2])]
    (peak,) = overoptimization.peaks([{"size": "small", "proxy": "0", "kl_coef": 0.0, "rows": rows}])
    assert (peak["size"], peak["proxy"], peak["kl_coef"], peak["peak"], peak["low"]) == ("small", "0", 0.0, 0.5, 0.2)


def test_curves_are_compared_at_equal_distance_counted_from_their_own_start():
    rows = [{"sqrt_kl": d, "gold": g} for d, g in [(0.0, 1.0), (2.0, 2.0), (5.0, 3.5), (4.0, 0.0), (6.0, 1.0)]]
    assert overoptimization.at_distance(rows, 0.0) == 0
    assert overoptimization.at_distance(rows, 1.0) == pytest.approx(0.5)
    assert overoptimization.at_distance(rows, 4.5) == pytest.approx(2.25)  # on the way out, not on the way back
    assert overoptimization.at_distance(rows, 5.5) == pytest.approx(-0.25)
    assert np.isnan(overoptimization.at_distance(rows, 6.1))


def test_proxies_of_a_size_are_compared_where_all_of_them_came():
    near, far = curve(0, 0.5, 0.0, True)[:3], curve(3, 0.4, 0.0, True)  # reach 2 and 4; straight lines
    found = [{"size": "small", "proxy": "0", "kl_coef": 0.0, "rows": near}, {"size": "large", "proxy": "0", "rows": far}]
    found.append({"size": "small", "proxy": "worst", "kl_coef": 0.0, "rows": far})
    small, large = overoptimization.at_equal_distance(found)
    assert small == {"size": "small", "kl_coef": 0.0, "sqrt_kl": 2.0, "gain": pytest.approx({"0": 1.0, "worst": 0.8})}
    assert large == {"size": "large", "kl_coef": None, "sqrt_kl": 4.0, "gain": pytest.approx({"0": 1.6})}


def test_the_figure_shows_the_mean_over_the_seeds_of_each_size():
    rows = [{"size": "small", "proxy": str(m), "rows": curve(m, 0.5, 0.0, True)} for m in range(2)]
    rows.append({"size": "small", "proxy": "worst", "rows": curve(100, 0.5, 0.1, True)})
    x = [0.0, 1.0, 2.0, 3.0, 4.0]
    gold = plots.Series("small", x, [0.5, 1.0, 1.5, 2.0, 2.5], 0, marks=True)  # the seeds start at 0 and 1
    proxy = plots.Series("small, proxy", x, [0.0, 2.0, 4.0, 6.0, 8.0], 0, faint=True)
    expected = plots.lines("Best of n", [gold, proxy], "\u221aKL to the fine-tuned model (nats)")
    assert overoptimization.figure("Best of n", rows) == plots.alone(expected)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"noise": 0.5}, "noise=0.5"),
        ({"responses": 1}, "responses=1"),
        ({"pressed": 4}, "between 1 and the 3 seeds"),
        ({"proxy": study.reward_model.Config()}, "2 or more models"),
        ({"choices": (64,)}, "3 layers and 1 choices"),
    ],
)
def test_impossible_studies(fields, told):
    with pytest.raises(ValueError, match=told):
        study.Config(**fields)
