"""The report of a made-up run: what it says, what it leaves out, and that nothing in it is fetched or executed."""

from __future__ import annotations

import html.parser
import json
import math
import re
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf.evaluation import findings, page, plots, report

HOSTILE = "<script>alert(1)</script> & *stars* | `tick`"


def _row(kl: float, vader: float, textblob: float, wins: tuple[float, float, float] | None, **changes) -> dict:
    row = {"prompts": 768, "proxy": 1.7 * math.sqrt(kl / 6), "kl": kl, "entropy": 3.3 - 0.15 * kl, "length": 18.8 - 0.8 * kl}
    row |= {
        "eos_rate": 1.0 if kl else 0.88,
        "distinct_1": 0.32 - 0.01 * kl,
        "distinct_2": 0.75 - 0.02 * kl,
        "distinct_texts": 1.0,
    }
    row["judges"] = {"vader": vader, "textblob": textblob, "ridge": 0.2 + 0.2 * textblob}
    if wins:
        row["win_rate"] = {
            name: [rate, rate - 0.03, rate + 0.03] for name, rate in zip(("vader", "textblob", "ridge"), wins, strict=True)
        }
    return row | changes


def _curve(steps: int, per_step: float, textblob) -> list[dict]:
    rows = []
    for step in range(0, steps + 1, 6):
        kl = per_step * step
        d = math.sqrt(kl)
        flat = {"kl": kl, "proxy": 0.62 * d - 0.02 * kl, "vader": min(0.97, 0.2 + 0.2 * d), "textblob": textblob(d)}
        rows.append({"step": step} | {f"held_out/{k}": v for k, v in (flat | {"distinct_2": 0.75 * 0.9**d}).items()})
    return rows


HEADINGS = [
    *("Before and after", "Figures and their bars", "Language model", "Reward model", "PPO", "Policies side by side"),
    *("Over-optimisation: PPO without the KL penalty", "Second round", "Who chose", "Where the numbers come from"),
]
SAMPLES = [
    {"prompt": "too silly to be", "before": " a modern directorial, but not nearly every bit.", "after": " honest. it's fun."},
    {
        "prompt": "the sound is",
        "before": " on this camera i heard of - a dvd player.",
        "after": " so good. making this great camera.",
    },
    {"prompt": HOSTILE, "before": HOSTILE, "after": " fine"},
]


def _results() -> dict[str, dict]:
    """A whole run with control and over-optimisation, with the figures of the recipe."""
    model = {"movie": 0.807, "product": 0.787, "tweet": 0.837}
    ridge, vader = {"movie": 0.813, "product": 0.808, "tweet": 0.841}, {"movie": 0.677, "product": 0.756, "tweet": 0.884}
    both = {"movie": 0.826, "product": 0.813, "tweet": 0.86}
    table = [{"confidence": c, "accuracy": c - 0.02, "pairs": 1000} for c in (0.55, 0.65, 0.75, 0.85, 0.95)]
    reward = {
        "accuracy": {"model": model, "ridge": ridge, "vader": vader, "model_and_ridge": both},
        "calibration": {"ece": 0.021, "table": table},
    }
    judged = ("proxy", "vader", "win_vader", "textblob", "win_textblob")
    of_n = {1: (0.0, 0.22, 0.5, 0.15, 0.5), 2: (0.37, 0.3, 0.55, 0.2, 0.54), 8: (1.07, 0.42, 0.674, 0.29, 0.64)}
    nbest = [
        {"n": n, "kl": math.log(n) - (n - 1) / n, "length": 17.0, **dict(zip(judged, row, strict=True))}
        for n, row in of_n.items()
    ]
    evaluate = {
        "baseline": _row(0.0, 0.222, 0.149, None),
        "baseline_again": _row(0.0, 0.22, 0.15, (0.504, 0.483, 0.51)),
        "candidate": _row(6.2, 0.706, 0.487, (0.855, 0.809, 0.84)),
        "best_of_n": nbest,
        "samples": SAMPLES,
    }
    second = {"baseline": evaluate["baseline"], "candidate": _row(7.5, 0.76, 0.612, (0.908, 0.893, 0.9)), "samples": SAMPLES}
    control = {"baseline": evaluate["baseline"], "candidate": _row(7.1, 0.722, 0.484, (0.883, 0.811, 0.85))}
    ppo = {"curve": _curve(30, 0.2, lambda d: 0.15 + 0.14 * d)}
    results = {
        "pretrain": {"bits_per_character": 1.754, "nll_per_token": 4.553, "parameters": 2_560_000},
        "sft": {"nll_per_token": 3.9, "nll_per_token_before": 4.1},
        "reward_model": reward,
        "ppo": ppo,
        "evaluate": evaluate,
        "sample_pairs": {"drawn": 3072, "distinct": 3060, "top_p": 0.9},
        "label": {
            "labeler": "simulated",
            "name": "simulated-vader",
            "noise": 0.1,
            "choices": {"left": 1500, "right": 1519, "tie": 41},
        },
        "reward_model_2": reward | {"choices": {"held_out": 450, "accuracy": 0.839, "accuracy_before": 0.828}},
        "ppo_2": ppo,
        "evaluate_2": second,
        "reward_model_control": reward,
        "ppo_control": ppo,
        "evaluate_control": control,
        "overoptimize": {"curve": _curve(60, 0.2, lambda d: 0.1 * d), "samples": SAMPLES[:2]},
        "reward_model_narrow": reward,
        "overoptimize_narrow": {
            "curve": _curve(60, 1.4, lambda d: 0.14 + 0.19 * d * math.exp(-d / 4.5)),
            "samples": SAMPLES[:2],
        },
    }
    times = [191, 14, 118, 72, 18, 9, 0.6, 45, 70, 12, 45, 70, 12, 80, 50, 80]
    return {
        stage: result | {"seconds": float(wall), "cpu_seconds": 1.7 * wall}
        for (stage, result), wall in zip(results.items(), times, strict=True)
    }


def _metrics(stage: str) -> list[dict]:
    random = np.random.default_rng(0)
    if stage in ("pretrain", "sft"):
        n = 400 if stage == "pretrain" else 50
        return [{"step": i, "loss/lm": 4.4 + 4 * math.exp(-i / 40) + 0.1 * random.normal()} for i in range(n)]
    if stage.startswith("ppo"):
        return [
            {
                "step": i,
                "reward/score": 1.7 * (1 - math.exp(-i / 8)) + 0.05 * random.normal(),
                "policy/kl_ref": 6 * (1 - math.exp(-i / 9)),
                "rollout/length": 14 + 4 * math.exp(-i / 5),
                "policy/entropy": 2.4 + math.exp(-i / 7),
            }
            for i in range(30)
        ]
    return []


def make_run(folder: Path, results: dict[str, dict]) -> Path:
    """Write the made-up run as the stages would."""
    for stage, result in results.items():
        (folder / stage).mkdir(parents=True)
        (folder / stage / "result.json").write_text(json.dumps(result))
        (folder / stage / "config.yaml").write_text("out: somewhere\nseed: 7\n")
        rows = _metrics(stage)
        if rows:
            (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class _Checker(html.parser.HTMLParser):
    """Every tag is closed, none is a script, and none points outside."""

    void = frozenset({"meta", "br", "path", "line", "rect", "circle"})

    def __init__(self):
        super().__init__()
        self.open, self.words = [], []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe", "object")
        for name, value in attrs:
            assert name not in ("src", "onload", "onerror")
            assert name != "href" or value.startswith("#")  # a mark drawn again
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def _read(folder: Path) -> str:
    """The page's text, after checking its tags."""
    text = (folder / "report.html").read_text()
    checker = _Checker()
    checker.feed(text)
    assert checker.open == []
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "nan" not in re.findall(r"[a-z]+", " ".join(checker.words))
    return "\n".join(checker.words)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "made-up", _results())
    return folder, report.write(folder, command="python experiments/rlhf.py --out runs/made-up")


def test_the_page_tells_the_whole_run(whole):
    folder, _ = whole
    text = _read(folder)
    assert [heading for heading in HEADINGS if f"\n{heading}\n" not in text] == []
    assert "85.5 % (82.5 to 88.5)" in text
    assert "is about as accurate as a bag-of-words ridge" in text
    assert "not people" in text
    assert "VADER with 10 % errors" in text
    assert "python experiments/rlhf.py --out runs/made-up" in text
    assert "seed 7" in text
    assert text.count(HOSTILE) == 2  # shown as it was written: as a prompt and as an answer


def test_markdown_and_its_pictures(whole):
    folder, _ = whole
    text = (folder / "report.md").read_text()
    assert "<script>" not in text
    pictures = re.findall(r"\]\((plots/[a-z_0-9]+\.svg)\)", text)
    assert len(pictures) == len(set(pictures)) == len(list((folder / "plots").glob("*"))) >= 14
    for picture in pictures:
        root = ElementTree.parse(folder / picture).getroot()
        assert root.tag.endswith("svg")
        assert "prefers-color-scheme:dark" in root[0].text
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_summary_holds_every_figure(whole):
    folder, summary = whole
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["results"]["evaluate"]["candidate"]["win_rate"]["vader"][0] == 0.855
    assert "seconds" not in summary["results"]["ppo"]
    assert summary["times"]["ppo"]["seconds"] == 72
    assert summary["about"]["seed"] == 7
    assert summary["about"]["machine"]["cores"] >= 1
    assert "jax" in summary["about"]["versions"]


def test_a_second_writing_changes_nothing_but_times(whole):
    folder, summary = whole
    (folder / "plots" / "of_an_older_report.svg").write_text("")
    assert report.write(folder, command="python experiments/rlhf.py --out runs/made-up") == summary
    assert not (folder / "plots" / "of_an_older_report.svg").exists()


def _bar(results, start: str) -> findings.Bar:
    found = [bar for bar in findings.bars(results) if bar.name.startswith(start)]
    assert len(found) == 1
    return found[0]


def test_every_bar_of_a_good_run_is_met():
    bars = findings.bars(_results())
    assert len(bars) == 26
    assert [bar.name for bar in bars if bar.met is not True] == []
    assert "All 26 bars below are met" in " ".join(findings.verdict(_results()))


@pytest.mark.parametrize(
    ("path", "value", "name", "shown"),
    [
        ("pretrain/bits_per_character", 1.81, "Language model", "1.810 \u2264 1.800"),
        (
            "reward_model/accuracy/model/movie",
            0.79,
            "Reward model: held-out pairs of people's ratings, m",
            "79.0 % \u2265 79.5 %",
        ),
        ("evaluate/candidate/win_rate/vader/0", 0.799, "PPO over fine-tuned: VADER", "79.9 % \u2265 80.0 %"),
        ("evaluate/candidate/kl", 9.5, "PPO: KL", "9.50 \u2264 9.00"),
        ("evaluate/candidate/length", 9.0, "PPO: length", "0.48 \u2265 0.65"),
        ("evaluate/candidate/distinct_2", 0.5, "PPO: distinct-2", "0.67 \u2265 0.75"),
        ("evaluate/baseline_again/win_rate/vader/0", 0.56, "Sanity: fine-tuned against itself, V", "56.0 % 45.0 % to 55.0 %"),
        ("evaluate/best_of_n/2/win_textblob", 0.9, "PPO over best-of-8: TextBlob", "80.9 % \u2265 90.0 %"),
        ("label/choices/left", 900, "Second round: new choices", "2419 \u2265 2500"),
        ("evaluate_control/candidate/judges/textblob", 0.7, "Second round: TextBlob mean", "0.612 \u2265 0.700"),
        ("ppo/curve/0/held_out~kl", -0.2, "Sanity: size of the KL", "0.2 \u2264 0.001"),
        ("pretrain/seconds", 300.0, "Whole loop with its second round: wall", "659 s \u2264 600 s"),
    ],
)
def test_a_missed_bar_is_named(path, value, name, shown):
    results = _results()
    place = results
    *path, last = [int(key) if key.isdigit() else key.replace("~", "/") for key in path.split("/")]
    for key in path:
        place = place[key]
    place[last] = value
    bar = _bar(results, name)
    assert (bar.met, f"{bar.value} {bar.bar}") == (False, shown)
    assert f"missed: {bar.name}" in " ".join(findings.verdict(results))


def test_a_small_run_claims_nothing():
    results = _results()
    for who in ("baseline", "baseline_again", "candidate"):
        results["evaluate"][who]["prompts"] = 48
    bars = findings.bars(results)
    assert {bar.met for bar in bars if not bar.name.startswith("Whole loop")} == {None}
    assert [bar.bar for bar in bars if bar.name.startswith("Whole loop")] == ["\u2264 90 s"]
    assert "This is a small run" in " ".join(findings.verdict(results))


def test_the_verdict_follows_the_reward_model():
    results = _results()
    for gap, words in ((0.02, "beats"), (-0.002, "is about as accurate as"), (-0.05, "falls behind")):
        ridge = results["reward_model"]["accuracy"]["ridge"]
        results["reward_model"]["accuracy"]["model"] = {domain: value + gap for domain, value in ridge.items()}
        assert f"The reward model {words} a bag-of-words ridge" in " ".join(findings.verdict(results))


def test_best_of_n_is_called_cheaper_only_where_it_is():
    results = _results()
    assert "so per nat best-of-n is the cheaper way" in " ".join(findings.verdict(results))
    results["evaluate"]["best_of_n"][2]["win_textblob"] = 0.51
    text = " ".join(findings.verdict(results))
    assert "51.0 % by TextBlob at 1.2 nats or less; PPO's KL is 5.1 times that." in text


def test_the_verdict_names_the_reward_model_that_was_exploited():
    results = _results()
    assert "a reward model of movie ratings alone is exploited" in " ".join(findings.verdict(results))
    for stage in ("overoptimize", "overoptimize_narrow"):
        results[stage] = _results()["overoptimize" if stage == "overoptimize_narrow" else "overoptimize_narrow"]
    assert "penalty the reward model is exploited" in " ".join(findings.verdict(results))


def test_the_verdict_says_when_over_optimisation_did_not_show():
    results = _results()
    results["overoptimize_narrow"]["curve"] = _curve(60, 0.2, lambda d: 0.1 * d)
    assert "did not show clearly" in " ".join(findings.verdict(results))


def test_a_person_who_chose_is_named(tmp_path):
    results = _results()
    results["label"] |= {"labeler": "human", "name": "ann"}
    report.write(make_run(tmp_path / "run", results))
    text = _read(tmp_path / "run")
    assert "a person at the terminal chose" in text
    assert "made by a person" in text
    assert "VADER made the choices here" not in text


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 10, 13, 14, 16])
def test_absent_stages_are_left_out(tmp_path, count):
    results = dict(list(_results().items())[:count])
    report.write(make_run(tmp_path / "run", results))
    text = _read(tmp_path / "run")
    assert ("Second round" in text) == (count >= 7)  # from the choices on
    assert ("Over-optimisation" in text) == (count >= 14)


@pytest.mark.parametrize("stage", list(_results()))
def test_any_stage_may_be_the_only_one_and_bare(tmp_path, stage):
    report.write(make_run(tmp_path / "alone", {stage: _results()[stage]}))
    _read(tmp_path / "alone")
    report.write(make_run(tmp_path / "bare", {stage: {}}))
    _read(tmp_path / "bare")


def test_the_command_is_the_one_that_was_typed(tmp_path, monkeypatch):
    main = types.SimpleNamespace(__spec__=types.SimpleNamespace(name="experiments.rlhf"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["/elsewhere/rlhf.py", "--out", "my runs/a"])
    folder = make_run(tmp_path / "run", {"pretrain": {}})
    assert report.write(folder)["about"]["command"] == "python -m experiments.rlhf --out 'my runs/a'"
    main.__spec__ = None
    assert report.write(folder)["about"]["command"] == "python /elsewhere/rlhf.py --out 'my runs/a'"
    monkeypatch.setattr(sys, "argv", [""])
    assert report.write(folder)["about"]["command"] is None
    (folder / "config.yaml").write_text("out: x\nseed: -3\n")
    assert report.write(folder)["about"]["seed"] == -3


def test_unreadable_or_absent_results_are_named(tmp_path):
    with pytest.raises(ValueError, match="no stage is done"):
        report.write(tmp_path)
    folder = make_run(tmp_path / "run", {"pretrain": {}})
    (folder / "pretrain" / "metrics.jsonl").write_text('{"step": 0, "loss/lm": "nan"}\n{"step": 1, "loss/lm": 2}\n{"cut')
    report.write(folder)
    (folder / "pretrain" / "metrics.jsonl").write_text("oops\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not a JSON object"):
        report.write(folder)
    (folder / "pretrain" / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json is not readable JSON"):
        report.write(folder)


def test_smoothing_keeps_a_straight_line():
    line = [0.5 * i for i in range(200)]
    np.testing.assert_allclose(plots.smooth(line), line)
    assert np.std(plots.smooth(np.random.default_rng(0).normal(size=1000).tolist())) < 0.3


def test_plots_of_hard_values():
    for y in ([1.0, 1.0], [0.0, 0.0], [math.nan, 2.0], [math.inf, 1.0], [5.0]):
        svg = plots.lines("t", [plots.Series("s", list(range(len(y))), y, marks=True)], "x", [plots.Level("limit", 1.5)])
        ElementTree.fromstring(svg)
        assert not re.search(r"nan|inf", svg)
    with pytest.raises(ValueError, match="no finite value"):
        plots.lines("t", [plots.Series("s", [0.0], [math.nan])], "x")
    with pytest.raises(ValueError, match="no bar"):
        plots.bars("t", {})
    ElementTree.fromstring(plots.bars("a & b", {"<g>": {"one": -0.5}, "h": {"two": 3.0}}, percent=False))


def test_inline_marks_after_escaping():
    assert page.inline("**a<b** `c*d`") == "<b>a&lt;b</b> <code>c*d</code>"
