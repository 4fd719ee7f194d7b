"""Which pairs are asked about first: formulas against the papers, the order of prompts, the queue, the labelling run."""

from __future__ import annotations

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_feedback as reference
from scripts import script

from experiments import label, selecting, stage
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.feedback import assignments, labelers, selection, store
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import ensemble as ensembles
from jaxrlhf.rewards import model as rewards

MARGINS = np.random.default_rng(0).normal(size=(5, 40)) * np.linspace(0.1, 6, 40)


@pytest.mark.parametrize("by", ["uncertainty", "disagreement", "bald"])
def test_worth_equals_the_reference(by):
    expected = [getattr(reference, by)(column) for column in MARGINS.T.tolist()]
    np.testing.assert_allclose(selection.worth(MARGINS, by), expected, rtol=1e-9, atol=1e-15)


def test_ends_and_what_one_model_can_say():
    """Sure members of one mind are worth nothing, sure ones of two minds most; one model cannot disagree with itself."""
    sure = np.array([[800.0, 800.0, 0.0], [800.0, -800.0, 0.0]])
    assert selection.bald(sure).tolist() == [0, pytest.approx(np.log(2)), 0]
    assert selection.disagreement(sure).tolist() == [0, 0.25, 0]
    assert selection.uncertainty(sure).tolist() == [0, pytest.approx(np.log(2)), pytest.approx(np.log(2))]
    nearest = np.argsort(-selection.worth(MARGINS[:1], "uncertainty"))
    assert nearest.tolist() == np.argsort(np.abs(MARGINS[0])).tolist()
    for by in ("disagreement", "bald"):
        with pytest.raises(ValueError, match=f"'{by}' of 1 model"):
            selection.worth(MARGINS[:1], by)
    with pytest.raises(ValueError, match="2 of 4 margins are no finite"):
        selection.worth(np.array([[0.0, np.nan], [np.inf, 1.0]]), "bald")


def test_random_is_drawn_by_the_seed():
    first, again, other = (selection.worth(MARGINS, "random", seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()


def test_every_prompt_once_before_any_twice():
    value = np.array([9.0, 8.0, 7.0, 1.0, 2.0, 2.0])
    prompts = ["film", "film", "film", "book", "book", "song"]
    assert selection.order(value, prompts).tolist() == [0, 4, 5, 1, 3, 2]
    assert selection.order(value, prompts, {"film": 1}).tolist() == [4, 5, 0, 3, 1, 2]
    assert selection.order(value, list("abcdef")).tolist() == [0, 1, 2, 4, 5, 3]


def test_labels_needed_lie_on_the_curve():
    labels, curve = np.array([10, 20, 40]), np.array([0.5, 0.6, 0.7])
    assert selection.labels_needed(labels, curve, 0.5) == 10
    assert selection.labels_needed(labels, curve, 0.65) == pytest.approx(30)
    assert selection.labels_needed(labels, curve, 0.8) == float("inf")


def test_the_share_of_labels_and_its_interval():
    labels, rng = np.arange(10, 110, 10), np.random.default_rng(3)
    noise = 0.001 * rng.normal(size=(12, 10))
    random = 0.5 + 0.002 * labels + noise
    twice = 0.5 + 0.004 * labels + noise  # as good with half of the labels
    found = selection.share_needed(labels, twice, random)
    assert found.rate == pytest.approx(0.5, abs=0.02)
    assert 0.48 < found.low <= found.rate <= found.high < 0.52
    assert selection.share_needed(labels, random, random).rate == 1
    never = selection.share_needed(labels, random - 0.05, random)
    assert (never.rate, never.high) == (float("inf"), float("inf"))


def _pairs(n: int) -> list[store.Pair]:
    return [store.Pair(f"the film {i} is", f" good{'!' * (i % 5)}", f" bad {i}") for i in range(n)]


@pytest.fixture
def place(tmp_path):
    """A store with twelve pairs, the first of them gold."""
    with contextlib.closing(store.open_store(tmp_path / "feedback.sqlite")) as db:
        store.add_pairs(db, _pairs(12))
        assignments.add_gold(db, [(_pairs(1)[0], "a")])
    return tmp_path / "feedback.sqlite"


def test_pairs_trade_places_in_the_queue(place):
    ids, rules = [pair.id for pair in _pairs(14)], assignments.Rules(gold_share=0.0)
    with contextlib.closing(store.open_store(place)) as db:
        assignments.ask_first(db, [ids[9], ids[2], ids[5]])
        queue = [pair.id for pair in assignments.waiting(db, rules)]
        assert queue == [ids[i] for i in (1, 9, 3, 4, 2, 6, 7, 8, 5, 10, 11)], "they share out the places that they had"
        assert [each.pair.id for each in assignments.give(db, "ann", rules, 11)] == [*queue[:11]]
        assert [pair.id for pair in store.unlabelled(db, "bob")] == [ids[0], *queue], "at the terminal too"
        store.add_pairs(db, _pairs(14))
        assert [pair.id for pair in assignments.waiting(db, rules)][-2:] == ids[12:], "later ones come after"
        for wrong, told in ((["nobody"], "unknown"), ([ids[0]], "gold"), ([ids[3], ids[3]], "each has one place")):
            with pytest.raises(ValueError, match=told):
                assignments.ask_first(db, [ids[11], *wrong])
        assert [pair.id for pair in assignments.waiting(db, rules)][:11] == queue, "nothing changed"


def _reward_model(folder, several: ensembles.Config | None):
    """A reward model of random weights, as reward_model.py writes one."""
    trained = tokenizers.train([pair.prompt + pair.response_a + pair.response_b for pair in _pairs(12)], 300)
    shape = TransformerConfig(trained.vocab_size, 16, 1, 2, 2, 8, 32, max_length=64)
    params = sharding.init_params(stage.specs(shape, "reward_model", several), jax.random.key(0))
    scale = np.linspace(0.5, 2.0, several.members, dtype=np.float32) if several else np.float32(2.0)
    notes = {"pooling": "mean"} | ({} if several is None else {"ensemble": {"members": several.members, "of": several.of}})
    stage.save(folder, "reward_model", params | {"gain": scale, "bias": scale}, shape, trained, **notes)


@pytest.mark.parametrize("members", [1, 3])
def test_margins_are_those_of_each_member_in_the_unit_of_the_choices(tmp_path, members):
    several = ensembles.Config(members, "heads") if members > 1 else None
    _reward_model(tmp_path / "model", several)
    found = selecting.read_margins(tmp_path / "model", _pairs(12), size=8)
    mesh = sharding.make_mesh(MeshConfig())
    judged = stage.load(tmp_path / "model", mesh, "reward_model")
    for m in range(members):
        own = judged.params if several is None else ensembles.member(judged.params, m, several)
        own = own | {"gain": jnp.ones(()), "bias": jnp.zeros(())}
        for pair, margin in list(zip(_pairs(12), found[m], strict=True))[5:8]:
            score = []
            for response in (pair.response_a, pair.response_b):
                tokens = judged.tokenizer
                row = [tokens.bos, *tokens.encode(pair.prompt), *tokens.encode(response, continuation=True), tokens.eos]
                one = jnp.array([row], jnp.int32), jnp.array([len(row)], jnp.int32)
                score.append(float(rewards.score(judged.model, own, *one, "mean")[0]))
            assert margin == pytest.approx(score[0] - score[1], abs=1e-4)  # bfloat16 nowhere, float32 sums


def test_the_pairs_that_members_dispute_are_labelled_first(place, tmp_path):
    _reward_model(tmp_path / "model", ensembles.Config(3, "heads"))
    with contextlib.closing(store.open_store(place)) as db:
        waiting = assignments.waiting(db, assignments.Rules())
    value = selection.disagreement(selecting.read_margins(tmp_path / "model", waiting))
    expected = [waiting[i].id for i in np.argsort(-value, kind="stable")]
    config = label.Config(
        store=place,
        out=tmp_path / "label",
        limit=5,
        person=labelers.Person(noise=0.0, left=1.0),
        select=selecting.Config("disagreement", tmp_path / "model"),
    )
    result = label.run(config)
    assert result["select"]["pairs"] == 11
    assert result["select"]["worth"]["first"] == pytest.approx(value.max())
    assert result["person"]["left"] == 1
    with contextlib.closing(store.open_store(place)) as db:
        said = [choice.pair for choice in store.choices(db)]
    assert len(said) == 5
    assert [pair for pair in said if pair != _pairs(1)[0].id] == expected[: 5 - (_pairs(1)[0].id in said)]


def test_settings_that_cannot_be_are_refused(place, tmp_path):
    with pytest.raises(ValueError, match=r"select\.by=bald needs a reward model"):
        selecting.Config("bald")
    with pytest.raises(ValueError, match=r"select\.by=random reads no reward model"):
        selecting.Config("random", tmp_path)
    _reward_model(tmp_path / "single", None)
    with (
        contextlib.closing(store.open_store(place)) as db,
        pytest.raises(ValueError, match="take an ensemble of 2 or more"),
    ):
        selecting.ask_first(db, selecting.Config("disagreement", tmp_path / "single"), assignments.Rules(), 1)


@pytest.mark.full
def test_the_study_of_label_efficiency_runs_and_goes_on(tmp_path):
    """Its smallest form, on a language model of random weights."""
    trained = tokenizers.train(["a film that is good", "a sound that is bad"], 300)
    shape = TransformerConfig(trained.vocab_size, 16, 1, 2, 2, 8, 32, max_length=64)
    params = sharding.init_params(stage.specs(shape, "policy"), jax.random.key(0))
    stage.save(tmp_path / "model", "policy", params, shape, trained)
    flags = ("--preset", "smoke", "--init", tmp_path / "model", "--out", tmp_path / "study", "--width", 24)
    done = script("label_efficiency", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "study/result.json").read_text())
    assert result["labels"] == [20, 40, 60]
    for rows in result["accuracy"].values():
        assert np.shape(rows) == (2, 3)
        assert [row[0] for row in rows] == [row[0] for row in result["accuracy"]["random"]], "all begin with the same labels"
    assert [row["way"] for row in result["compared"]] == ["random", "uncertainty", "disagreement", "bald"]
    assert result["compared"][0]["share_needed"]["60"]["rate"] <= 1
    assert (tmp_path / "study/plots/label_efficiency.svg").read_text().startswith("<svg")
