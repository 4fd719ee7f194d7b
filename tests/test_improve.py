"""Rounds of improvement: the gates against references, snapshots, the chain of manifests, promotion, rollback, and resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import threading
import time
import types

import jax
import numpy as np
import pytest
import serving_cases
from safetensors.numpy import load_file
from scripts import ROOT, command, environment, script

from experiments import candidate, improve, one_round, serve, stage
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import human_sentiment, pipeline
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.feedback import assignments, labelers, rounds, snapshots, store
from jaxrlhf.feedback import improve as gating
from jaxrlhf.feedback.improve import Limits, Measured, Rows
from jaxrlhf.models import heads, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import model as rewards_model
from jaxrlhf.serving import watch
from jaxrlhf.serving.engine import Ask, Engine, Options
from jaxrlhf.training import directory, events

# --------------------------------------------------------------------------------------------------------------- gates


def reference_bootstrap(rows: Rows, draws: int, seed: int) -> tuple[float, float, float]:
    """Mean and 95 % percentile interval over resampled clusters, in plain loops of float64."""
    names = sorted(set(rows.groups))
    members = [[float(v) for v, g in zip(rows.values, rows.groups, strict=True) if g == name] for name in names]
    means = []
    for drawn in np.random.default_rng(seed).integers(0, len(names), (draws, len(names))):
        taken = [value for one in drawn for value in members[one]]
        means.append(sum(taken) / len(taken))
    low, high = (float(np.percentile(means, share)) for share in (2.5, 97.5))
    return sum(map(float, rows.values)) / len(rows.values), low, high


@pytest.mark.parametrize("clusters", [1, 7, 40])
def test_intervals_equal_the_reference(clusters):
    rng = np.random.default_rng(clusters)
    rows = Rows(rng.choice([-1.0, 0.0, 0.5, 1.0], 40), [f"prompt {i % clusters}" for i in range(40)])
    assert gating.bootstrap(rows, 300, seed=3) == pytest.approx(reference_bootstrap(rows, 300, seed=3), abs=1e-12)


def test_choices_on_one_prompt_are_not_independent():
    """A row said ten times is no further evidence: the interval of whole clusters stays as wide as that of the rows."""
    values = np.random.default_rng(0).integers(0, 2, 30).astype(np.float64)
    names = [f"{i:02d}" for i in range(30)]
    once, often = Rows(values, names), Rows(np.repeat(values, 10), np.repeat(names, 10).tolist())
    assert gating.bootstrap(once) == pytest.approx(gating.bootstrap(often), abs=1e-12)
    apart = Rows(often.values, [str(i) for i in range(300)])
    assert gating.bootstrap(apart).high - gating.bootstrap(apart).low < 0.5 * (
        gating.bootstrap(once).high - gating.bootstrap(once).low
    )


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 values of 0 groups"):
        gating.bootstrap(Rows(np.zeros(0), []))
    with pytest.raises(ValueError, match="2 values of 1 groups"):
        gating.bootstrap(Rows(np.zeros(2), ["a"]))


def test_equal_scores_are_half_right_and_nan_stays():
    np.testing.assert_array_equal(gating.outcomes(np.array([2.0, 0.0, -1e-9, np.nan])), [1.0, 0.5, 0.0, np.nan])


def share(right: float, count: int = 200) -> Rows:
    """So many rows of prompts of their own, that share of them 1 and the rest 0."""
    return Rows((np.arange(count) < right * count).astype(np.float64), [str(i) for i in range(count)])


def gain(by: float, count: int = 200) -> Rows:
    """Of so many choices that share is won (or, below 0, lost), the rest is as before."""
    return Rows(np.sign(by) * share(abs(by), count).values, [str(i) for i in range(count)])


GOOD = Measured(
    wins=share(0.6, 768),
    kl=4.0,
    length=0.8,
    distinct_2=0.9,
    new_choices=share(0.7),
    held_out_choices=gain(0.02),
    earlier_choices=gain(-0.005),
    gold_choices=gain(0.0),
    people_on_gold=share(0.9, 30),
    policy_choices=share(0.48),
    by_labeler={"ann": share(0.7, 100), "bob": share(0.45, 100), "eve": share(0.0, 19)},  # on proof; eve's are too few
    fallen=0,
)


def refused(measured: Measured, limits: Limits) -> list[str]:
    return [gate.name for gate in gating.gates(measured, limits) if not gate.passed]


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({}, []),
        ({"wins": share(0.5, 768)}, ["win_rate"]),  # no proof of gain, though none of loss
        ({"wins": share(0.52, 768)}, ["win_rate"]),
        ({"kl": 15.01}, ["kl"]),
        ({"kl": float("nan")}, ["kl"]),
        ({"length": 0.49}, ["length"]),
        ({"length": 2.01}, ["length"]),
        ({"distinct_2": 0.59}, ["distinct_2"]),
        ({"new_choices": share(0.3)}, ["new_choices"]),  # inverted labels, read by a reward model of accuracy 0.7
        ({"new_choices": Rows(np.full(200, np.nan), ["a"] * 200)}, ["new_choices"]),
        ({"by_labeler": {"ann": share(0.7, 1000), "bob": share(0.3, 100)}}, ["each_labeler"]),  # whom ann's many do not hide
        ({"by_labeler": {}}, []),
        ({"held_out_choices": gain(-0.1)}, ["held_out_choices"]),
        ({"earlier_choices": gain(-0.1)}, ["earlier_choices"]),
        ({"gold_choices": gain(-0.1)}, ["gold_choices"]),
        ({"people_on_gold": share(0.5, 30)}, ["people_on_gold"]),
        ({"policy_choices": share(0.4)}, ["policy_choices"]),
        ({"fallen": 1}, ["regression"]),
        ({"fallen": None}, []),
        ({"gold_choices": gain(-1.0, 19), "people_on_gold": share(0, 19)}, []),  # too few to say anything
    ],
)
def test_each_gate_refuses_what_it_is_for_and_nothing_else(changed, names):
    measured = dataclasses.replace(GOOD, **changed)
    assert refused(measured, Limits()) == names
    assert refused(measured, dataclasses.replace(Limits(), **open_limits(names))) == []


def open_limits(names: list[str]) -> dict[str, None]:
    """Fields of `Limits` that leave these gates open."""
    fields = {"length": ("shortest", "longest")}
    return {field: None for name in names for field in fields.get(name, (name,))}


def test_every_limit_belongs_to_a_gate_and_is_told():
    told = {gate.name: gate.plain() for gate in gating.gates(GOOD, Limits())}
    assert (told["length"]["least"], told["length"]["most"]) == (0.5, 2.0)
    named = {field.name for field in dataclasses.fields(Limits)} - {"few", "shortest", "longest"}
    assert named | {"length"} == set(told)
    assert told["win_rate"]["measured"] == pytest.approx(gating.bootstrap(GOOD.wins).low)
    assert told["earlier_choices"]["measured"] == pytest.approx(gating.bootstrap(GOOD.earlier_choices).high)
    assert told["new_choices"]["measured"] == pytest.approx(0.7)


def test_the_page_has_every_gate_in_order_with_its_default():
    page = (ROOT / "docs" / "improvement.md").read_text(encoding="utf-8")
    table = page[page.index("## The gates") : page.index("## A poisoned round")]
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", table, re.MULTILINE)
    told = {gate.name: gate for gate in gating.gates(GOOD, Limits())}
    assert [name for name, _ in rows] == [name for name in told if name in dict(rows)]
    assert {name for name, _ in rows} == set(told)
    for name, limit in rows:
        gate = told[name]
        least, most = (None if x is None else f"{x:g}" for x in (gate.least, gate.most))
        expected = f"{least} to {most}" if least and most else f">= {least}" if least else f"<= {most}"
        assert limit.removesuffix(" nats") == expected, name


@pytest.mark.parametrize("limits", [{"win_rate": 1.5}, {"new_choices": -0.1}, {"few": 1}])
def test_limits_that_cannot_be_are_refused(limits):
    with pytest.raises(ValueError, match=f"gates.{next(iter(limits))}={next(iter(limits.values()))}"):
        Limits(**limits)


@pytest.mark.parametrize(
    ("new", "minutes", "every", "begins"),
    [(199, 1e9, None, False), (200, 0, None, True), (1, 60, 60, True), (0, 1e9, 60, False), (10**6, 59, 60, False)],
)
def test_when_a_round_is_due(new, minutes, every, begins):
    assert gating.due(new, minutes, 200, every) == begins


# ----------------------------------------------------------------------------------------------------------- snapshots


def _pair(number: int) -> store.Pair:
    return store.Pair(f"prompt {number}", f" first {number}", f" second {number}", "served", "served")


def _choose(db, numbers, labeler: str = "ann", word: store.Word = "left") -> None:
    store.add_pairs(db, [_pair(i) for i in numbers])
    store.record(db, [store.Choice(_pair(i).id, labeler, word, "a") for i in numbers])


@pytest.fixture
def db(tmp_path):
    with contextlib.closing(store.open_store(tmp_path / "feedback.sqlite")) as connection:
        yield connection


def test_a_snapshot_is_what_stood_then(db, tmp_path):
    _choose(db, range(40))
    undone = store.undo(db, "ann")
    _choose(db, range(3), "mallory", "right")
    upto = store.last_sequence(db)
    _choose(db, range(40, 60))
    store.undo(db, "ann")
    told = snapshots.freeze(db, tmp_path / "one", upto, 10, 0.25, ["mallory"])
    found = {name: snapshots.read(tmp_path / "one", name) for name in ("learned", "held_out", "gold")}
    every = found["learned"] + found["held_out"]
    assert undone is not None
    assert {row["pair"] for row in every} == {_pair(i).id for i in range(40)} - {undone.pair}
    assert {row["labeler"] for row in every} == {"ann"}
    assert told["choices"] == 39
    assert told["new"] == sum(row["sequence"] > 10 for row in every) == 29
    assert (len(found["learned"]), len(found["held_out"])) == (told["learned"], told["held_out"])
    assert 0 < told["held_out"] < 20
    assert snapshots.freeze(db, tmp_path / "one", store.last_sequence(db), 0, 0.25) == told  # kept, whatever came since
    again = snapshots.freeze(db, tmp_path / "two", upto, 10, 0.25, ["mallory"])
    assert again == told  # files of the same bytes


def test_a_pair_never_changes_sides(db, tmp_path):
    _choose(db, range(30))
    snapshots.freeze(db, tmp_path / "1", store.last_sequence(db), 0, 0.3)
    _choose(db, range(30, 90))
    _choose(db, range(90), "bob", "right")
    snapshots.freeze(db, tmp_path / "2", store.last_sequence(db), 30, 0.3)
    sides = [
        {row["prompt"] for row in snapshots.read(tmp_path / number, side)}
        for side in ("held_out", "learned")
        for number in "12"
    ]
    assert sides[0] <= sides[1]
    assert sides[2] <= sides[3]
    assert not sides[1] & sides[3]


def test_gold_pairs_are_apart_and_say_who_reads(db, tmp_path):
    _choose(db, range(10))
    assignments.add_gold(db, [(_pair(i), "a") for i in range(100, 104)] + [(_pair(104), "tie")])
    _choose(db, [100, 101], "ann", "left")
    _choose(db, [102], "ann", "right")
    _choose(db, [103], "ann", "skip")
    told = snapshots.freeze(db, tmp_path / "snap", store.last_sequence(db), 0, 0.2)
    assert told["choices"] == 10
    gold = snapshots.read(tmp_path / "snap", "gold")
    assert [(row["chosen"], row["rejected"]) for row in gold] == [(f" first {i}", f" second {i}") for i in range(100, 104)]
    assert told["people_on_gold"] == [[_pair(100).id, True], [_pair(101).id, True], [_pair(102).id, False]]


def test_texts_that_no_file_can_hold_are_left_out_and_counted(db, tmp_path):
    """What a policy of bytes writes is kept in the store as it is; a file of lines is read strictly."""
    _choose(db, range(10))
    bad = [store.Pair("prompt", " a\0b", " c"), store.Pair("", " a", " b")]
    store.add_pairs(db, bad)
    assignments.add_gold(db, [(store.Pair("gold", " x\0", " y"), "a")])
    store.record(db, [store.Choice(pair.id, "ann", "left", "a") for pair in bad])
    told = snapshots.freeze(db, tmp_path / "snap", store.last_sequence(db), 0, 0.2)
    assert (told["choices"], told["unreadable"], told["gold"]) == (10, 2, 0)
    assert len(snapshots.read(tmp_path / "snap", "learned")) == told["learned"]


def test_a_snapshot_that_was_touched_is_refused_by_name(db, tmp_path):
    _choose(db, range(20))
    snapshots.freeze(db, tmp_path / "snap", 20, 0, 0.3)
    held = tmp_path / "snap" / "held_out.jsonl"
    held.write_text(held.read_text().replace(" first", " other", 1))
    with pytest.raises(ValueError, match=r"held_out\.jsonl is not as it was written"):
        snapshots.freeze(db, tmp_path / "snap", 20, 0, 0.3)
    with pytest.raises(ValueError, match="no choice to learn from up to event 0"):
        snapshots.freeze(db, tmp_path / "none", 0, 0, 0.3)


# --------------------------------------------------------------------------------------- manifests, promotion, rollback


def folder_of(out: pathlib.Path, number: int, text: str) -> pathlib.Path:
    """A round's policy, as far as its manifest and the service's watch look at it."""
    policy = rounds.place(out, number) / "policy"
    policy.mkdir(parents=True)
    (policy / "config.json").write_text(text)
    return policy


@pytest.fixture
def out(tmp_path) -> pathlib.Path:
    """Rounds 0 to 4, of which 3 was refused; 4 is served."""
    for number, (served, passed) in enumerate([(None, True), (0, True), (1, True), (2, False), (2, True)]):
        folder_of(tmp_path, number, f"policy {number}")
        rounds.seal(tmp_path, number, {"served": served, "passed": passed})
        if passed:
            assert rounds.promote(tmp_path, number, served)
    return tmp_path


def leads_to(out: pathlib.Path) -> str:
    return (out / rounds.SERVING / "config.json").read_text()


def test_the_chain_holds_and_what_passed_is_served(out):
    found = rounds.chain(out)
    assert [manifest["round"] for manifest in found] == [0, 1, 2, 3, 4]
    assert found[0]["parent"] is None
    assert rounds.served(out) == [0, 1, 2, 4]
    assert leads_to(out) == "policy 4"
    assert {path.name for path in (out / rounds.SERVING).iterdir()} == {"config.json"}  # the policy and nothing else
    with pytest.raises(ValueError, match=r"004.round\.json is there already"):
        rounds.seal(out, 4, {"served": 2, "passed": True})


@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_manifest_that_was_touched_is_refused_by_name(out, number):
    file = rounds.place(out, number) / rounds.FILE
    file.write_text(file.read_text().replace('"passed": true', '"passed": false'))
    with pytest.raises(ValueError, match=rf"00{number}.round\.json is not as it was written"):
        rounds.chain(out)


def test_a_manifest_of_another_history_is_refused_by_name(out, tmp_path_factory):
    """Each is sound by itself; only the chain says that round 2 was not followed by this round 3."""
    other = tmp_path_factory.mktemp("other")
    for number in range(4):
        folder_of(other, number, f"another {number}")
        rounds.seal(other, number, {"served": None, "passed": True})
    shutil.copy(rounds.place(other, 3) / rounds.FILE, rounds.place(out, 3) / rounds.FILE)
    assert rounds.read(out, 3)["round"] == 3
    with pytest.raises(ValueError, match=r"003.round\.json does not follow .*002.round\.json"):
        rounds.chain(out)
    (rounds.place(out, 2) / rounds.FILE).unlink()
    with pytest.raises(ValueError, match="there is no round 2; there are 5"):
        rounds.chain(out)
    shutil.copy(rounds.place(out, 1) / rounds.FILE, rounds.place(out, 2) / rounds.FILE)
    with pytest.raises(ValueError, match=r"002.round\.json: is the manifest of round 1"):
        rounds.chain(out)


@pytest.mark.parametrize("damage", ["changed", "gone", "more"])
def test_a_policy_that_was_touched_is_never_served_again(out, damage):
    policy = rounds.place(out, 1) / "policy"
    if damage == "gone":
        shutil.rmtree(policy)
    else:
        (policy / ("config.json" if damage == "changed" else "extra")).write_text("policy X")
    with pytest.raises(ValueError, match=r"001.policy is not as round 1 left it"):
        rounds.roll_back(out, 1)
    assert leads_to(out) == "policy 4"


def test_rollback_goes_back_step_by_step_and_is_told(out):
    before = watch.place(out / rounds.SERVING)
    assert rounds.roll_back(out) == 2
    assert leads_to(out) == "policy 2"
    assert watch.place(out / rounds.SERVING) != before  # which is how the service knows
    assert rounds.roll_back(out) == 1
    assert rounds.roll_back(out, 4) == 4  # forth again, by number
    assert rounds.roll_back(out) == 1
    assert rounds.roll_back(out, 0) == 0
    with pytest.raises(ValueError, match="nothing to go back to"):
        rounds.roll_back(out)
    with pytest.raises(ValueError, match="round 0 is served already"):
        rounds.roll_back(out, 0)
    with pytest.raises(ValueError, match="round 3 was refused by its gates"):
        rounds.roll_back(out, 3)
    with pytest.raises(ValueError, match="there is no round 9; there are 5"):
        rounds.roll_back(out, 9)
    told = [(event["kind"], event["round"], event["before"]) for event in events.read(out / "rounds")]
    assert told[:4] == [("promoted", 0, None), ("promoted", 1, 0), ("promoted", 2, 1), ("promoted", 4, 2)]
    assert told[4:] == [("rolled back", n, m) for n, m in ((2, 4), (1, 2), (4, 1), (1, 4), (0, 1))]
    assert rounds.chain(out)  # no manifest was touched


def test_what_was_measured_against_a_policy_no_longer_served_is_not_promoted(out):
    """Somebody went back while a round was under way, which had begun from round 4."""
    folder_of(out, 5, "policy 5")
    rounds.seal(out, 5, {"served": 4, "passed": True})
    rounds.roll_back(out)
    one_round.settle(out)
    assert leads_to(out) == "policy 2"
    assert events.read(out / "rounds")[-1]["kind"] == "superseded"
    one_round.settle(out)  # said once
    assert [event["kind"] for event in events.read(out / "rounds")].count("superseded") == 1


def test_a_promotion_that_was_cut_off_is_finished(out, monkeypatch):
    """Between the manifest and the log, and between the log and the symlink; a reader sees the old policy or the new one."""
    folder_of(out, 5, "policy 5")
    rounds.seal(out, 5, {"served": 4, "passed": True})
    assert leads_to(out) == "policy 4"

    def cut(*given):
        raise KeyboardInterrupt

    replace = os.replace
    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        one_round.settle(out)
    assert (rounds.served(out)[-1], leads_to(out)) == (5, "policy 4")
    monkeypatch.setattr(os, "replace", replace)
    one_round.settle(out)
    assert leads_to(out) == "policy 5"
    assert [event["round"] for event in events.read(out / "rounds")].count(5) == 1


def test_a_full_disk_is_told_and_nothing_else_is_served(out, monkeypatch):
    folder_of(out, 5, "policy 5")
    rounds.seal(out, 5, {"served": 4, "passed": True})
    write, full = os.write, OSError(28, "No space left on device")

    def no_room(handle, data):
        if b"promoted" in data or b"rolled back" in data:
            raise full
        return write(handle, data)

    monkeypatch.setattr(os, "write", no_room)
    assert not rounds.promote(out, 5, 4)
    with pytest.raises(ValueError, match="the log could not be written, so round 4 is served as before"):
        rounds.roll_back(out)
    assert leads_to(out) == "policy 4"
    monkeypatch.setattr(os, "write", write)
    one_round.settle(out)  # the next start
    assert leads_to(out) == "policy 5"


# ------------------------------------------------------------------------------------------------- a round, stage by stage


class Stages:
    """In the place of the scripts that train and measure: each writes a folder made of what it was given, once."""

    def __init__(self, monkeypatch, passes: bool = True):
        self.done: list[str] = []
        self.cut_at = -1  # of the calls: where the process ends
        self.passes = passes
        monkeypatch.setattr(one_round.reward_model, "run", self.reward)
        for name, page in one_round.ALGORITHMS.items():
            monkeypatch.setattr(page, "run", lambda config, name=name: self.policy(name, config))
        monkeypatch.setattr(candidate, "run", self.measure)

    def write(self, name: str, config, *parts: pathlib.Path) -> None:
        if self.cut_at == len(self.done):
            raise KeyboardInterrupt
        if not (config.out / "model").is_dir():
            self.done.append(name)
            (config.out / "model").mkdir(parents=True)
            content = [rounds.digest(part) if part.is_dir() else part.read_text() for part in parts]
            (config.out / "model" / "config.json").write_text(rounds.digest_of([name, config.seed, content]))

    def reward(self, config) -> None:
        assert config.held_out_pairs == 0
        self.write("reward_model", config, config.refresh, config.reference, config.choices)

    def policy(self, name: str, config) -> None:
        self.write(name, config, config.policy, *(() if config.init is None else (config.init,)), config.reward)

    def measure(self, config) -> dict:
        self.write("candidate", config, config.served, config.candidate, config.snapshot)
        found = GOOD if self.passes else dataclasses.replace(GOOD, wins=share(0.4, 768))
        gates = [gate.plain() for gate in gating.gates(found, config.gates)]
        return {"gates": gates, "labelers": {"ann": [70.0, 100.0]}, "accuracy": {}, "policies": {}, "win_rate": {}}


@pytest.fixture
def settings(tmp_path, monkeypatch) -> improve.Config:
    """A store of 60 choices and two models to begin with; what the stages train is made up."""
    monkeypatch.setattr(one_round.stage, "kind", lambda folder: folder.name)
    for name in ("policy", "reward_model"):
        (tmp_path / "start" / name).mkdir(parents=True)
        (tmp_path / "start" / name / "config.json").write_text(f"first {name}")
    with contextlib.closing(store.open_store(tmp_path / "feedback.sqlite")) as db:
        _choose(db, range(60))
    start = tmp_path / "start"
    given = improve.Config(start / "policy", start / "reward_model", tmp_path / "feedback.sqlite", tmp_path / "out")
    return dataclasses.replace(given, rounds=1, wait=improve.Wait(choices=50, seconds=0.001))


def without_time(manifest: dict) -> dict:
    return {name: value for name, value in manifest.items() if name not in ("time", "parent")}


@pytest.mark.parametrize("cut", range(3))
def test_a_round_that_was_cut_off_goes_on_and_ends_the_same(settings, monkeypatch, tmp_path, cut):
    stages = Stages(monkeypatch)
    whole = dataclasses.replace(settings, out=tmp_path / "whole")
    assert improve.run(whole) == {"served": 1, "rounds": [{"round": 1, "passed": True}]}
    stages.done, stages.cut_at = [], cut
    with pytest.raises(KeyboardInterrupt):
        improve.run(settings)
    assert not (rounds.place(settings.out, 1) / rounds.FILE).exists()
    with contextlib.closing(store.open_store(settings.store)) as db:  # people go on choosing meanwhile
        _choose(db, range(60, 90))
        store.undo(db, "ann")
    stages.cut_at = -1
    with pytest.raises(ValueError, match=r"begun with other settings \(prompts\)"):
        improve.run(dataclasses.replace(settings, prompts=512))
    assert improve.run(settings)["served"] == 1
    assert stages.done == ["reward_model", "ppo", "candidate"]  # none twice
    one, other = (without_time(rounds.read(place, 1)) for place in (whole.out, settings.out))
    assert one == other
    assert leads_to(settings.out) == leads_to(whole.out) != "first policy"


@pytest.mark.parametrize("moment", ["freeze", "copy", "seal", "promote"])
def test_a_round_that_was_cut_off_beside_its_stages_goes_on_too(settings, monkeypatch, tmp_path, moment):
    stages = Stages(monkeypatch)
    whole = dataclasses.replace(settings, out=tmp_path / "whole")
    improve.run(whole)
    improve.run(dataclasses.replace(settings, rounds=0))  # round 0 alone
    place = snapshots if moment == "freeze" else rounds
    real = getattr(place, moment)

    def cut(*given):
        if moment == "copy" and given[1].name != "policy":
            return real(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(place, moment, cut)
    with pytest.raises(KeyboardInterrupt):
        improve.run(settings)
    monkeypatch.setattr(place, moment, real)
    stages.done = []
    improve.run(settings)
    assert len(stages.done) == {"freeze": 3, "copy": 1, "seal": 0, "promote": 0}[moment]
    assert without_time(rounds.read(settings.out, 1)) == without_time(rounds.read(whole.out, 1))
    assert leads_to(settings.out) == leads_to(whole.out)
    assert [event["round"] for event in events.read(settings.out / "rounds")] == [0, 1]


def test_a_refused_round_is_kept_reported_and_not_served(settings, monkeypatch, capsys):
    stages = Stages(monkeypatch, passes=False)
    assert improve.run(settings) == {"served": 0, "rounds": [{"round": 1, "passed": False}]}
    report = (rounds.place(settings.out, 1) / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert report.startswith("round 1, from round 0: refused by win_rate\n")
    assert "| win_rate | 0.3" in report
    assert "| ann | 0.700 |" in report
    assert leads_to(settings.out) == "first policy"
    stages.passes = True
    with contextlib.closing(store.open_store(settings.store)) as db:
        _choose(db, range(60, 260))
    assert improve.run(dataclasses.replace(settings, rounds=2))["served"] == 2
    manifest = rounds.read(settings.out, 2)
    assert manifest["parent"]["round"] == 1  # in the chain
    assert manifest["served"] == 0  # but it began from what is served
    assert manifest["snapshot"]["known"] == 0  # and all choices are new to that
    assert manifest["snapshot"]["new"] == manifest["snapshot"]["choices"] == 260


@pytest.mark.parametrize(("reference", "first", "second"), [("first", (0, None), (0, 1)), ("current", (0, None), (1, None))])
def test_the_policy_goes_on_from_the_served_one_near_its_reference(settings, monkeypatch, reference, first, second):
    """(reference, where it starts from else) of two rounds."""
    stages, seen = Stages(monkeypatch), []
    real = stages.policy
    monkeypatch.setattr(stages, "policy", lambda name, config: (seen.append(config), real(name, config))[1])
    asked = dataclasses.replace(settings, reference=reference, algorithm="dpo", once=True, rounds=None)
    for expected in (first, second):
        improve.run(asked)
        config = seen.pop()
        of_round = {rounds.place(settings.out, n) / "policy": n for n in range(3)}
        assert (of_round[config.policy], None if config.init is None else of_round[config.init]) == expected
        assert config.choices.name == "learned.jsonl"  # of the snapshot: never the held-out ones
    manifest = rounds.read(settings.out, 2)
    assert manifest["reference"]["round"] == second[0]
    assert manifest["algorithm"] == "dpo"
    assert "ppo" not in manifest["settings"]


def test_a_second_process_is_refused_and_a_rollback_is_not(settings, monkeypatch, tmp_path):
    Stages(monkeypatch)
    improve.run(settings)
    lock = directory.take_lock(settings.out)
    try:
        with pytest.raises(ValueError, match="in use by another run"):
            improve.run(dataclasses.replace(settings, rounds=2))
        assert improve.run(dataclasses.replace(settings, rollback="previous")) == {"served": 0, "rounds": []}
    finally:
        os.close(lock)
    assert leads_to(settings.out) == "first policy"
    with pytest.raises(ValueError, match="there are no rounds of improvement"):
        improve.run(dataclasses.replace(settings, out=tmp_path / "nowhere", rollback=1))


def test_bad_input_is_told_before_anything_begins(settings, monkeypatch, tmp_path):
    Stages(monkeypatch)
    with pytest.raises(ValueError, match="holds a policy, not a reward_model"):
        improve.run(dataclasses.replace(settings, reward=settings.start))
    with pytest.raises(FileNotFoundError, match=r"none\.sqlite: no feedback store"):
        improve.run(dataclasses.replace(settings, store=tmp_path / "none.sqlite"))
    with contextlib.closing(store.open_store(tmp_path / "few.sqlite")) as db:
        _choose(db, range(3))
    with pytest.raises(ValueError, match=r"few\.sqlite: \d choices to learn from, a round needs 32"):
        improve.run(dataclasses.replace(settings, store=tmp_path / "few.sqlite", once=True))
    assert not one_round.under_way(settings.out)
    improve.run(dataclasses.replace(settings, once=True))
    with pytest.raises(ValueError, match=r"other settings \(held_out: 0.15 there, 0.2 here"):
        improve.run(dataclasses.replace(settings, held_out=0.2))
    with pytest.raises(ValueError, match=r"held_out=0 must be in \(0, 1\)"):
        dataclasses.replace(settings, held_out=0)


def test_a_round_waits_for_enough_new_choices(settings, monkeypatch):
    Stages(monkeypatch)
    asked = dataclasses.replace(settings, wait=improve.Wait(choices=70, seconds=0.001))
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        assert len(looks) < 20
        with contextlib.closing(store.open_store(settings.store)) as db:
            _choose(db, range(60, 60 + len(looks)))

    monkeypatch.setattr(improve, "time", types.SimpleNamespace(sleep=sleep))
    improve.run(asked)
    assert looks == [0.001] * 10
    assert rounds.read(settings.out, 1)["snapshot"]["choices"] == 70


# ------------------------------------------------------------------------------------------------------ with real models


def write_models(folder: pathlib.Path) -> None:
    """A policy and a reward model of random weights that read reviews."""
    texts = [pipeline.clean(rating.text) for rating in human_sentiment.reviews("train")[:300]]
    tokenizer = tokenizers.train(texts, 400)
    shape = TransformerConfig(tokenizer.vocab_size, 16, 1, 2, 2, 8, 32, 64)
    params = transformer.build(shape).init(jax.random.key(0))
    stage.save(folder / "policy", "policy", params, shape, tokenizer)
    head = sharding.init_params(heads.score_specs(shape.width), jax.random.key(1))
    reward = rewards_model.with_scale({"trunk": params, "head": head})
    stage.save(folder / "reward_model", "reward_model", reward, shape, tokenizer, pooling="mean")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def add_real_pairs(path: pathlib.Path, count: int) -> None:
    """Pairs of words that people wrote: of what an untrained model writes VADER knows no word."""
    words = [pipeline.clean(rating.text).split() for rating in human_sentiment.reviews("train")]
    words = [row for row in words if len(row) > 8][: 2 * count]
    pairs = [
        store.Pair(" ".join(one[:3]), " " + " ".join(one[3:8]), " " + " ".join(two[3:8]))
        for one, two in zip(words[::2], words[1::2], strict=True)
    ]
    with contextlib.closing(store.open_store(path)) as opened:
        store.add_pairs(opened, pairs)


def flags_of(models: pathlib.Path, out: pathlib.Path) -> tuple:
    """A chain from these models in small, over a store of its own; gates that random weights pass."""
    out.mkdir()
    add_real_pairs(out / "feedback.sqlite", 150)
    start = ("--start", models / "policy", "--reward", models / "reward_model", "--store", out / "feedback.sqlite")
    limits = {
        "win-rate": 0.0,
        "few": 2,
        "new-choices": None,
        "each-labeler": None,
        "policy-choices": None,
        "held-out-choices": None,
    }
    limits |= {"earlier-choices": None, "regression": 1}
    gates = (word for name, value in limits.items() for word in (f"--gates.{name}", value))
    return ("--preset", "smoke", "--out", out / "chain", *start, *gates)


@pytest.mark.full
def test_one_round_end_to_end(models, tmp_path):
    """Simulated people, PPO, every gate measured on real models; then a rollback."""
    regression, chain = tmp_path / "regression.jsonl", tmp_path / "out" / "chain"
    regression.write_text('{"prompt": "the film is", "score": -1}\n{"prompt": "a good film", "score": 2}\n')
    done = script("improve", *flags_of(models, tmp_path / "out"), "--regression", regression)
    assert done.returncode == 0, done.stderr
    assert "serving leads to round 1" in done.stdout
    first, last = rounds.chain(chain)
    assert last["passed"]
    gates = {gate["name"]: gate for gate in last["gates"]}
    assert gates["regression"]["measured"] == 1  # nobody scores 2
    assert gates["gold_choices"]["measured"] is None
    assert gates["people_on_gold"]["measured"] is None
    assert gates["earlier_choices"]["measured"] is None  # round 0 had none
    assert 0 < gates["new_choices"]["measured"] < 1
    assert last["accuracy"]["policy"][0] == 0.5  # of round 0's policy over itself
    assert last["labelers"].keys() == {"simulated-vader"}
    assert last["snapshot"]["new"] == last["snapshot"]["choices"] > 50
    assert last["policies"]["first"]["kl"] == last["policies"]["served"]["kl"] == 0
    assert abs(last["policies"]["candidate"]["kl"]) > 0
    assert first["policy"] != last["policy"]
    served = chain / rounds.SERVING
    assert {path.name for path in served.iterdir()} == {
        "params.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    with contextlib.closing(store.open_store(tmp_path / "out" / "feedback.sqlite")) as opened:
        assert {pair.checkpoint_a for pair in store.pairs(opened)} == {"", str(rounds.place(chain, 0) / "policy")}
    improve.run(dataclasses.replace(improve.SMOKE, out=chain, rollback=0))
    for name, leaf in load_file(models / "policy" / "params.safetensors").items():
        assert load_file(served / "params.safetensors")[name].tobytes() == leaf.tobytes(), name


@pytest.mark.full
@pytest.mark.parametrize("reference", ["first", "current"])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo", "reinforce", "dpo"])
def test_two_rounds_by_each_algorithm(models, tmp_path, algorithm, reference):
    """The second goes on from the first's policy: near round 0's it begins away from its reference."""
    flags = ("--rounds", 2, "--algorithm", algorithm, "--reference", reference)
    done = script("improve", *flags_of(models, tmp_path / "out"), *flags)
    assert done.returncode == 0, done.stderr
    chain = tmp_path / "out" / "chain"
    assert rounds.served(chain) == [0, 1, 2]
    last = rounds.chain(chain)[2]
    assert (last["served"], last["reference"]["round"]) == (1, 0 if reference == "first" else 1)
    stage_of = rounds.place(chain, 2) / "stages" / algorithm / "result.json"
    begins = json.loads(stage_of.read_text())["curve"][0]["held_out/kl"]
    assert (abs(begins) < 1e-5) == (reference == "current")


@pytest.mark.full
def test_a_killed_round_ends_with_the_same_policy(models, tmp_path):
    """SIGKILL at random moments, then once more to the end: the manifest of the unbroken round, and its bytes."""
    whole, broken = (flags_of(models, tmp_path / name) for name in ("whole", "broken"))
    started = time.monotonic()
    assert script("improve", *whole).returncode == 0
    took, moments = time.monotonic() - started, random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(
            command("improve", *broken), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=moments.uniform(0.2, 0.8) * took)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    done = script("improve", *broken)
    assert done.returncode == 0, done.stderr
    manifests = [rounds.chain(tmp_path / name / "chain")[1] for name in ("whole", "broken")]
    assert len({manifest["policy"]["blake2b"] for manifest in manifests}) == 1
    assert manifests[0]["gates"] == manifests[1]["gates"]


def test_training_may_start_elsewhere_than_at_its_reference(tmp_path):
    mesh = sharding.make_mesh(MeshConfig())
    folders = [serving_cases.policy(tmp_path / str(seed), seed) for seed in (1, 2)]
    other = serving_cases.policy(tmp_path / "other", 1, context=64)
    with jax.set_mesh(mesh):
        start = stage.load(folders[0], mesh)
        found = stage.trainable(start, stage.lora.NONE, mesh, 0, folders[1])
        for name, leaf in load_file(folders[1] / "params.safetensors").items():
            part = found
            for key in name.split("/"):
                part = part[key]
            np.testing.assert_array_equal(part, leaf)
        with pytest.raises(ValueError, match="another shape"):
            stage.trainable(start, stage.lora.NONE, mesh, 0, other)
        with pytest.raises(ValueError, match=r"init=.* with lora\.rank=4"):
            stage.trainable(start, dataclasses.replace(stage.lora.NONE, rank=4), mesh, 0, folders[1])


class Heard:
    """What one row is given; with `held`, the engine's thread stands still at its first piece until `go`."""

    def __init__(self, held: bool = False):
        self.tokens, self.begun, self.go, self.ended = [], threading.Event(), threading.Event(), threading.Event()
        if not held:
            self.go.set()

    def __call__(self, piece):
        self.tokens += piece.tokens
        self.begun.set()
        assert self.go.wait(60)
        if piece.end:
            assert piece.end in ("stop", "length")
            self.ended.set()


def test_promotion_and_rollback_under_16_rows_drop_none_and_restore_the_answers(tmp_path):
    for number, served in ((0, None), (1, 0)):
        serving_cases.policy(rounds.place(tmp_path, number) / "policy", number + 1)
        rounds.seal(tmp_path, number, {"served": served, "passed": True})
    rounds.promote(tmp_path, 0, None)
    link, mesh = tmp_path / rounds.SERVING, sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    config, seen = serving_cases.config(link), watch.place(link)

    def load(folder):
        return serve.policy_of(config, stage.load(folder, mesh))

    wanted = [Ask((1, 40 + i, 50), i, 24, 1.0, 1.0) for i in range(16)]
    with contextlib.closing(Engine(load(pathlib.Path(seen[0])), Options(slots=4, chunk=4))) as made:

        def ask(heard: list[Heard]) -> list[Heard]:
            made.submit(made.bench, wanted, heard)
            return heard

        def answers(heard: list[Heard]) -> list[list[int]]:
            for one in heard:
                assert one.ended.wait(60)
            return [one.tokens for one in heard]

        before = answers(ask([Heard() for _ in wanted]))
        with contextlib.closing(watch.Watch(link, load, made, seen, 3600)) as look:
            under_way = ask([Heard(held=True), *(Heard() for _ in wanted[1:])])
            assert under_way[0].begun.wait(60)
            assert rounds.promote(tmp_path, 1, 0)
            assert look.look()
            under_way[0].go.set()
            assert answers(under_way) == before
            assert answers(ask([Heard() for _ in wanted])) != before
            rounds.roll_back(tmp_path)
            assert look.look()
            assert answers(ask([Heard() for _ in wanted])) == before


@pytest.mark.parametrize(("inverted", "name", "better"), [(False, "simulated-vader", "a"), (True, "simulated-inverted", "b")])
def test_simulated_people_choose_on_new_pairs_alone_and_say_so(settings, monkeypatch, inverted, name, better):
    """And a drill turns their choices round."""
    Stages(monkeypatch)
    improve.run(dataclasses.replace(settings, rounds=0))

    def pairs(config):
        assert config.policies == (rounds.place(settings.out, 0) / "policy",)
        assert config.count == 8
        with contextlib.closing(store.open_store(config.store)) as db:
            store.add_pairs(db, [store.Pair(f"film {i} is", " wonderful", " dreadful") for i in range(8)])

    monkeypatch.setattr(one_round.sample_pairs, "run", pairs)
    simulated = improve.Simulated(labelers.Person(noise=0.0), inverted)
    one_round.simulate(dataclasses.replace(settings, simulate=8, simulated=simulated), 1)
    with contextlib.closing(store.open_store(settings.store)) as db:
        made = [choice for choice in store.choices(db) if choice.labeler != "ann"]
    assert [(choice.labeler, choice.preferred) for choice in made] == [(name, better)] * 8  # not on the 60 chosen on before
