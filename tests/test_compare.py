"""What the benchmarks beside peers say of themselves: the order of turns, shares, bounds, and the table in README."""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def benchmarks():
    """The modules of benchmarks/, which find their neighbours beside them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield argparse.Namespace(**{name: importlib.import_module(name) for name in ("measure", "generate", "contest", "run")})
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_every_second_round_runs_backwards(benchmarks):
    turns = []

    def case(name):
        return lambda: turns.append(name) or (1.0, 1.0)

    benchmarks.measure.alternate({"A": case("A"), "B": case("B")}, 4)
    assert turns == ["A", "B", *"ABBAABBA"]  # the first calls compile


def test_shares_and_bounds_are_of_each_sides_own_rate(benchmarks):
    products = {"decode": {"shape": [2, 3, 4], "flops": 600}, "heads": {"shape": [2, 3, 5], "flops": 400}}
    own = {"decode": 2000.0, "heads": 1000.0}  # 300 + 400 ms
    peer = {"product_rates": {"decode": 1000.0, "heads": 500.0}}  # 600 + 800 ms
    results = {"ours": {"median_ms": 1000.0}, "peer": {"median_ms": 2800.0}}
    found = benchmarks.measure.against(results, products, own, {"peer": peer})
    assert results["ours"]["share_of_product_rate"] == pytest.approx(0.7)
    assert results["peer"]["share_of_product_rate"] == pytest.approx(0.5)
    assert found["ratios"] == {"peer over ours": pytest.approx(2.8)}
    assert found["bound_by_products"] == {"peer": pytest.approx(4.0)}


def test_what_an_iteration_asks_of_products_by_hand(benchmarks):
    passes = {"score": 3, "score_heads": 1, "update": 2, "update_heads": 1}
    found = benchmarks.generate.products_of("tiny", (32, 64, 16), 8, 10, passes)
    layer = 4 * (4 * 128 * 128 + 3 * 128 * 512)  # weights of all layers
    flops = {
        "prompts": 2 * 8 * 64 * layer,
        "decode": 2 * 32 * 16 * layer,
        "decode heads": 2 * 32 * 16 * 128 * 512,
        "learn": 2 * 32 * 80 * layer * (3 + 6),
        "learn heads": 2 * 32 * 16 * 128 * 512 * (1 + 3),
    }
    assert {name: each["flops"] for name, each in found.items()} == flops
    assert found["learn"]["shape"] == [800, 128, 512]
    assert found["decode heads"]["shape"] == [32, 128, 512]


def test_models_that_differ_and_missing_updates_are_refused(benchmarks):
    one, other = {"logprobs": [-1.0], "scores": [0.5]}, {"logprobs": [-1.0], "scores": [0.502]}
    assert benchmarks.contest.check({"a": one, "b": one}) == {"a": 0.0, "b": 0.0}
    for wrong in (other, {"logprobs": [float("nan")], "scores": [0.5]}):
        with pytest.raises(SystemExit, match="not the same models"):
            benchmarks.contest.check({"a": one, "b": wrong})
    benchmarks.contest.count_updates({"a": [{"updates": 4}, {"updates": 8}]}, 4)
    with pytest.raises(SystemExit, match="not the same work"):
        benchmarks.contest.count_updates({"a": [{"updates": 4}, {"updates": 5}]}, 4)


def test_interpreters_reach_the_scripts_that_use_them(benchmarks):
    config = argparse.Namespace(all=False, names=["generate", "sampling"], shapes=["tiny"], compare=True, repeats=2)
    config = argparse.Namespace(**vars(config), torch=pathlib.Path("T"), trl=None, trl16=None, tunix=None)
    (first, generate), (second, sampling) = benchmarks.run.commands(config)
    assert (first, second) == ("generate tiny", "sampling")
    assert generate[2:] == ["--shape", "tiny", "--transformers", "T", "--repeats", "2"]
    assert sampling[2:] == []
    assert pathlib.Path(generate[1]).exists()


def test_every_benchmark_that_is_run_is_there_and_its_peers_scripts_too(benchmarks):
    for job in benchmarks.run.JOBS:
        text = (ROOT / "benchmarks" / f"{job.script}.py").read_text()
        for ours, theirs in job.peers:
            assert ours in benchmarks.run.PEERS
            assert f'"--{theirs}"' in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "give names"),
        (["--all", "generate"], "give names"),
        (["nothing"], "no benchmark nothing"),
        (["generate", "--compare"], "--compare goes with"),
        (["generate", "--tunix", sys.executable], "--compare goes with"),
        (["generate", "--compare", "--tunix", "/no/such/python"], "there is no"),
        (["generate", "--readme"], "--readme needs"),
        (["generate", "--repeats", "3"], "must be even"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(benchmarks, monkeypatch, capsys, given, said):
    monkeypatch.setattr(sys, "argv", ["run.py", *given])
    with pytest.raises(SystemExit):
        benchmarks.run.main()
    assert said in capsys.readouterr().err


def test_the_table_in_readme_is_that_of_its_result(benchmarks):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (file,) = benchmarks.run.BETWEEN.findall(text)
    document = None
    if file != benchmarks.run.NONE:
        document = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
        assert document["documents"]
    assert benchmarks.run.with_table(text, file, document) == text


def test_a_table_says_what_its_result_does(benchmarks):
    ours = {"median_ms": 250.0, "share_of_product_rate": 0.4, "peak_bytes": 300 * 2**20}
    theirs = {"median_ms": 1000.0, "share_of_product_rate": 0.3, "peak_bytes": 600 * 2**20}
    one = {
        "load": 0.5,
        "model": {"width": 128},
        "equal_work": {"trl16": "jaxrlhf, equal work"},
        "results": {"jaxrlhf, equal work": ours, "trl16": theirs},
        "ratios": {"trl16 over jaxrlhf, equal work": 4.0},
        "bound_by_products": {"trl16": 9.96},
    }
    alone = {"load": 0.75, "results": {}}
    document = {
        "commit": "abc",
        "date": "2026-11-23",
        "not_run": ["trl", "tunix"],
        "failed": {"save": "no space"},
        "documents": {"grpo_step tiny": one, "decode_step tiny": alone},
    }
    text = "before\n<!-- peers: none -->\nold\n<!-- end of peers -->\nafter\n"
    found = benchmarks.run.with_table(text, "x.json", document)
    lines = found.splitlines()
    assert lines[:2] == ["before", "<!-- peers: x.json -->"]
    assert lines[4] == (
        "| GRPO iteration, against TRL 1.16 | 128 | 250 | 1000 | 4.00 x (aim 3) | 10.0 x | 0.40, 0.30 | 300, 600 |"
    )
    assert lines[6] == (
        "Commit abc, 2026-11-23, load of the machine up to 0.8 before a benchmark began. Not run: trl, tunix. Failed: save."
    )
    assert lines[7:] == ["<!-- end of peers -->", "after"]
    assert benchmarks.run.with_table(found, "x.json", document) == found
    one["results"]["trl16"]["median_ms"] = 1001.0
    assert benchmarks.run.with_table(found, "x.json", document) != found


def test_a_table_needs_its_two_comments(benchmarks):
    with pytest.raises(ValueError, match="one pair of comments"):
        benchmarks.run.with_table("no table here", "x.json", {})
