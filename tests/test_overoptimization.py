"""The gold reward's choices in the over-optimisation study, and how its curves are gathered."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import overoptimization as study


def test_pairs_follow_the_gold_score():
    gold = np.array([[0.3, -1.0, 0.3], [2.0, 1.0, 0.0]], np.float32)
    chosen = study.chosen_pairs(gold, noise=0.0, seed=1)
    np.testing.assert_array_equal(chosen[0], [[0, 1, 0], [0, 0, 0], [0, 1, 0]])  # equal scores are no choice
    np.testing.assert_array_equal(chosen[1], [[0, 1, 1], [0, 0, 1], [0, 0, 0]])


def test_a_share_of_the_choices_goes_wrong():
    gold = np.random.default_rng(0).normal(size=(4000, 3)).astype(np.float32)
    right, chosen = study.chosen_pairs(gold, 0.0, 1), study.chosen_pairs(gold, 0.2, 1)
    assert (chosen + chosen.swapaxes(1, 2) == right + right.swapaxes(1, 2)).all()  # each pair is chosen from once
    wrong = 1 - (right * chosen).sum() / right.sum()
    assert wrong == pytest.approx(0.2, abs=4 * (0.16 / 12_000) ** 0.5)  # 4 sigma
    best, kept = study.chosen_best(gold, 0.0, 1), study.chosen_best(gold, 0.2, 1)
    np.testing.assert_array_equal(best, gold.argmax(1))
    assert (best != kept).mean() == pytest.approx(0.2, abs=4 * (0.16 / 4000) ** 0.5)


def curve(start: float, a: float, b: float, best: bool) -> list[dict]:
    d = np.linspace(0, 4, 5)
    gain = d * (a - b * d) if best else d * (a - b * np.log(np.maximum(d, 1e-9)))
    return [{"sqrt_kl": x, "gold": start + y, "proxy": 2 * x} for x, y in zip(d.tolist(), gain.tolist(), strict=True)]


def test_seeds_of_a_size_are_fitted_together_and_ensembles_apart(tmp_path):
    best = [{"layers": 1, "proxy": str(m), "rows": curve(m, 0.5, 0.1, True)} for m in range(3)]
    best.append({"layers": 1, "proxy": "worst", "rows": curve(0, 0.7, 0.1, True)})
    pressed = [{"layers": 2, "proxy": str(m), "kl_coef": 0.0, "rows": curve(m, 0.4, 0.3, False)} for m in range(2)]
    found = study.fits(best, pressed)
    assert [(row["method"], row["layers"], row["proxy"]) for row in found] == [
        ("best_of_n", 1, "seeds"),
        ("best_of_n", 1, "worst"),
        ("ppo", 2, "seeds"),
    ]
    for row, (a, b) in zip(found, [(0.5, 0.1), (0.7, 0.1), (0.4, 0.3)], strict=True):
        assert (row["a"], row["b"], row["r2"]) == pytest.approx((a, b, 1.0))
    assert "kl_coef" not in found[0]
    assert found[2]["kl_coef"] == 0.0
    study.draw(tmp_path / "plots", best, pressed)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"best_of_n.svg", "ppo_0.svg"}
    assert "1 layers" in (tmp_path / "plots" / "best_of_n.svg").read_text()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"noise": 0.5}, "noise=0.5"),
        ({"responses": 1}, "responses=1"),
        ({"pressed": 4}, "between 1 and the 3 seeds"),
        ({"proxy_training": study.reward_model.Config()}, "2 or more models"),
    ],
)
def test_impossible_studies(fields, told):
    with pytest.raises(ValueError, match=told):
        study.Config(**fields)
