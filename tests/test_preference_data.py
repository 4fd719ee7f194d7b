"""Where the preference scripts get pairs: each kind of source, what is held out, and pairs of the policy's own answers."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_cases import preferences

from experiments import arithmetic, ppo, preference_data, stage, tasks
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import sources, tfds_preferences
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.feedback import store, unpaired
from jaxrlhf.models import transformer
from jaxrlhf.training.run import Run

ROWS = [
    {"prompt": "the film is", "chosen": " good.", "rejected": " bad."},
    {"prompt": "the sound is", "chosen": " clear.", "rejected": " loud.", "tie": True},
    {"prompt": "the end is", "chosen": " sudden and rather hard to follow.", "rejected": " long."},
]


@pytest.fixture
def places(tmp_path):
    """The same rows as each kind of source."""
    sources.write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    folder = tfds_preferences.write_tfds(tmp_path, {"train": ROWS})
    with contextlib.closing(store.open_store(tmp_path / "feedback.sqlite")) as db:
        pairs = [store.Pair(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]
        store.add_pairs(db, pairs)
        store.record(
            db,
            [store.Choice(p.id, "ann", "tie" if row.get("tie") else "left", "a") for p, row in zip(pairs, ROWS, strict=True)],
        )
    tfds_preferences.write_parquet(tmp_path / "pairs.parquet", ROWS)
    places = {"jsonl": tmp_path / "pairs.jsonl", "parquet": tmp_path / "pairs.parquet", "tfds": folder}
    return places | {"store": tmp_path / "feedback.sqlite"}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tfds", "store"])
def test_every_kind_of_source_gives_the_same_rows(places, kind, ties):
    found = preference_data.read(places[kind], ties)
    expected = [row for row in ROWS if ties or not row.get("tie")]
    assert [(row["prompt"], row["chosen"], row["rejected"], row["tie"]) for row in found] == [
        (row["prompt"], row["chosen"], row["rejected"], row.get("tie", False)) for row in expected
    ]


def test_nothing_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no choices"):
        preference_data.read(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": " b"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: rejected: missing"):
        preference_data.read(tmp_path / "bad.jsonl")


def test_too_long_pairs_are_counted_and_ties_kept(places):
    trained = tokenizers.train(["the film is good."], 300)
    longest = [max(len(trained.encode(row[side], continuation=True)) for side in ("chosen", "rejected")) for row in ROWS]
    whole = [len(trained.encode(row["prompt"])) + 2 + most for row, most in zip(ROWS, longest, strict=True)]  # bos and eos
    assert whole[2] > max(whole[:2])
    config = preference_data.Config(width=whole[2] - 1, held_out=0.5)
    found = preference_data.load(places["jsonl"], trained, config, seed=0)
    assert found.too_long == 1
    assert (len(found.train.weight), len(found.held_out.weight)) == (1, 1)
    assert sorted([*found.train.tie, *found.held_out.tie]) == [False, True]
    assert found.longest == max(longest[:2]) + 1  # with EOS
    with pytest.raises(ValueError, match="none of 3 choices has room in width=4"):
        preference_data.load(places["jsonl"], trained, dataclasses.replace(config, width=4), seed=0)


def test_thumbs_are_read_as_rows_that_stand_alone(places, tmp_path):
    """Up and down as they stand, in tokens as pairs have them, long ones counted; a run that goes on reads what it read."""
    trained = tokenizers.train(["the film is good."], 300)
    said = [
        unpaired.Rating("the film is", " good.", "ann", True),
        unpaired.Rating("the film is", " bad.", "ann", True),
        unpaired.Rating("the film is", " bad.", "ann", False),
        unpaired.Rating("the film is", " good.", "bob", False),
        unpaired.Rating("the film is", " good." * 40, "bob", False),
    ]
    with contextlib.closing(store.open_store(places["store"])) as db:
        unpaired.add(db, said)
    with Run.open(tmp_path / "run", preference_data.Config()) as run:
        fields, too_long = preference_data.thumbs(places["store"], trained, 24, run)
        assert (too_long, fields["desirable"].tolist()) == (1, [True, False, False])
        for row, each in enumerate((said[0], said[2], said[3])):
            start, whole = int(fields["prompt_len"][row]), int(fields["prompt_len"][row] + fields["response_len"][row])
            tokens = fields["tokens"][row].tolist()
            assert tokens[:start] == [trained.bos, *trained.encode(each.prompt)]
            assert tokens[start:whole] == [*trained.encode(each.response, continuation=True), trained.eos]
            assert set(tokens[whole:]) <= {trained.pad}
        with contextlib.closing(store.open_store(places["store"])) as db:
            unpaired.add(db, [unpaired.Rating("the film is", " good.", "eve", True)])
        assert len(preference_data.thumbs(places["store"], trained, 24, run)[0]["weight"]) == 3
    assert len(preference_data.thumbs(places["store"], trained, 24)[0]["weight"]) == 4
    with pytest.raises(ValueError, match="none of 5 thumbs has room in width=3"):
        preference_data.thumbs(places["store"], trained, 3)
    with pytest.raises(FileNotFoundError, match="thumbs are collected there by"):
        preference_data.thumbs(tmp_path / "none.sqlite", trained, 24)


def test_each_pair_is_on_one_side_and_the_seed_decides():
    given = preferences(0)
    sides = preference_data.split(given, 0.25, 1, 0, "here")
    assert (len(sides.train.weight), len(sides.held_out.weight)) == (6, 2)
    rows = np.concatenate([sides.held_out.margin, sides.train.margin])  # a number of its own in each row
    np.testing.assert_array_equal(np.sort(rows), np.sort(given.margin))
    assert sides.longest == int(given.response_len.max())
    again, other = (preference_data.split(given, 0.25, seed, 0, "here").held_out.margin for seed in (1, 2))
    np.testing.assert_array_equal(again, sides.held_out.margin)
    assert not np.array_equal(other, again)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"here: a share held_out={share} of 8 pairs"):
            preference_data.split(given, share, 1, 0, "here")


@pytest.mark.full
def test_own_answers_are_paired_by_the_tasks_score(tmp_path):
    model = arithmetic.PRESETS["smoke"].model
    params = transformer.build(model).init(jax.random.key(0))
    stage.save(tmp_path, "policy", jax.device_get(params), model, tokenizers.train(["1+1="], model.vocab_size))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])

    def score(rollout, prompts):
        """Larger ids are better; the first prompt's rewards have failed."""
        total = rollout.tokens.sum(axis=1).astype(jnp.float32)
        return total, jnp.where(rollout.group == rollout.group[0], 0.0, 1.0), {}

    settings = dataclasses.replace(ppo.ARITHMETIC, policy=tmp_path, batch=4, held_out_prompts=48)
    with jax.set_mesh(mesh), tasks.make(settings, mesh) as task:
        config = preference_data.Config(prompts=8, n=3, held_out=0.3)
        pairs = preference_data.judged(config, dataclasses.replace(task, score=score), mesh, 1)
    sides = [pairs.train, pairs.held_out]
    assert 4 <= sum(len(side.weight) for side in sides) <= 6  # one prompt of each of two batches has no scores
    for side in sides:
        assert (side.tokens[:, 0].sum(axis=1) > side.tokens[:, 1].sum(axis=1)).all()
        assert (side.weight == 1).all()
        assert side.ref_logprobs is None
        np.testing.assert_array_equal(side.prompt_len[:, 0], side.prompt_len[:, 1])
