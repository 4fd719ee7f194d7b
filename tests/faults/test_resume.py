"""A run that is broken off after every step ends as the unbroken one, bit for bit, whatever the stage and the devices."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from run_cases import ends

from experiments import (
    arithmetic,
    dpo,
    grpo,
    kto,
    online_dpo,
    orpo,
    ppo,
    preference_data,
    pretrain,
    raft,
    reinforce,
    reward_model,
    rloo,
    sft,
    stage,
)
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Outputs, Term
from jaxrlhf.data import arithmetic as sums
from jaxrlhf.data import pipeline, sources
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.feedback import store
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import pool
from jaxrlhf.training import checkpoint, ending, events, metrics, step
from jaxrlhf.training.run import Run

TINY = TransformerConfig(
    vocab_size=320, width=16, layers=1, heads=2, kv_heads=2, head_width=8, mlp_width=32, max_length=64, dtype="float32"
)
BROKEN = 99  # exit code of a session that was broken off


@pytest.fixture
def one_step(monkeypatch):
    """Every session is asked to end after its first step."""

    def asked(self, due: bool = False) -> tuple[bool, bool]:
        if self._stepping:  # not in the save after the last step
            self._offered, self.reason, self._code = True, "a test", BROKEN
        return self._stepping, due

    return lambda: monkeypatch.setattr(ending.Ending, "asked", asked)


@pytest.fixture
def use(monkeypatch):
    """Let scripts see so many devices."""
    every = jax.devices()
    return lambda count: monkeypatch.setattr(jax, "devices", lambda *_: every[:count])


def to_the_end(run, config) -> int:
    """Start the same run again and again until it is done; how many sessions that took."""
    for sessions in range(1, 100):
        try:
            run(config)
        except SystemExit as ended:
            if ended.code != BROKEN:
                raise
        else:
            return sessions
    raise AssertionError("it does not come to an end")


# --------------------------------------------------------------------------------------------- a toy, through three epochs


def toy_outputs(params, frozen, batch, key):
    del frozen
    return Outputs(scores=batch["x"] @ params["w"] + 0.01 * jax.random.normal(key))


def toy_loss(outputs, batch, config):
    del config
    return {"loss/toy": Term(jnp.square(outputs.scores - batch["y"]).sum(), jnp.float32(batch["y"].shape[0]))}, {}


@dataclasses.dataclass(frozen=True)
class Toy:
    out: pathlib.Path
    mesh: MeshConfig = MeshConfig()


def toy(config: Toy, devices: int, total: int, seen: list) -> np.ndarray:
    """Rows 0 .. 19 in batches of 8: an epoch ends inside a batch."""
    draw = np.random.default_rng(0)
    data = pipeline.batches({"x": draw.normal(size=(20, 8)).astype(np.float32), "y": np.arange(20, dtype=np.float32)}, 8, 3)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    specs = {"w": sharding.ParamSpec((8,), ("embed",), sharding.zeros)}
    with jax.set_mesh(mesh), Run.open(config.out, config, save_seconds=0.0, tensorboard=False) as run:
        made = optax.adam(0.1)
        train_step = step.make_train_step(toy_outputs, toy_loss, None, made)
        params = jax.device_put(sharding.init_params(specs, jax.random.key(0)), sharding.shardings(specs, mesh))
        state = run.restore(step.init_state(params, made, jax.random.key(0)))
        for i in run.steps(run.start, total, "toy"):
            batch = data[i]
            seen.append((i, batch["y"].tolist()))
            state, measured = train_step(state, (), sharding.shard_batch(batch, mesh))
            run.log(i, measured)
            run.maybe_save(i, state)
        run.done({})
        return np.asarray(state.params["w"])


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("total", [3, pytest.param(8, marks=pytest.mark.full)])
def test_broken_at_every_step_of_three_epochs(tmp_path, one_step, devices, total):
    mesh, whole, broken = MeshConfig(data=1, fsdp=devices), [], []
    want = toy(Toy(tmp_path / "whole", mesh), devices, total, whole)
    one_step()
    found = []
    sessions = to_the_end(lambda config: found.append(toy(config, devices, total, broken)), Toy(tmp_path / "broken", mesh))
    assert sessions == total + 1
    assert broken == whole
    if total == 8:
        assert len({y for _, rows in whole for y in rows}) == 20
        assert sum(len(rows) for _, rows in whole) > 3 * 20
    assert found[-1].tobytes() == want.tobytes()
    texts = [(tmp_path / name / metrics.FILE).read_bytes() for name in ("whole", "broken")]
    assert texts[0] == texts[1]


def test_another_number_of_devices_goes_on_with_the_same_batches(tmp_path, one_step):
    """1, then 2, 4 and 8 devices, a session each: the order of the rows is the unbroken run's, and so are the losses."""
    whole, broken = [], []
    want = toy(Toy(tmp_path / "whole"), 1, 4, whole)
    one_step()
    for devices in (1, 2, 4, 8):
        with pytest.raises(SystemExit):
            toy(Toy(tmp_path / "broken", MeshConfig(data=1, fsdp=devices)), devices, 4, broken)
    found = toy(Toy(tmp_path / "broken"), 1, 4, broken)
    assert broken == whole
    np.testing.assert_allclose(found, want, atol=1e-6)  # sums of float32 in another order
    losses = [[row["loss/toy"] for row in metrics.read(tmp_path / name)] for name in ("whole", "broken")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_every_step_can_be_gone_back_to(tmp_path):
    """From each checkpoint of an unbroken run the rest comes out the same."""
    made, total = optax.adam(0.1), 5
    train_step = step.make_train_step(toy_outputs, toy_loss, None, made)
    draw = np.random.default_rng(0)
    data = pipeline.batches({"x": draw.normal(size=(7, 8)).astype(np.float32), "y": np.arange(7, dtype=np.float32)}, 4, 3)
    fresh = lambda: step.init_state({"w": jnp.zeros(8)}, made, jax.random.key(0))  # noqa: E731
    state = fresh()
    for i in range(total):
        checkpoint.save(tmp_path, i, state, keep=total)
        state, _ = train_step(state, (), data[i])
    for first in range(total):
        again, _ = checkpoint.restore(tmp_path, fresh(), step=first)
        for i in range(first, total):
            again, _ = train_step(again, (), data[i])
        assert np.asarray(again.params["w"]).tobytes() == np.asarray(state.params["w"]).tobytes()
    assert train_step.programs() == 1  # a restored state is placed as a new one


# -------------------------------------------------------------------------------------------------------- the stages


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> pathlib.Path:
    """An untrained policy, a reward model over it, and choices."""
    out = tmp_path_factory.mktemp("start")
    params = jax.device_get(transformer.build(TINY).init(jax.random.key(0)))
    tokenizer = tokenizers.train(["1+1="], TINY.vocab_size)
    stage.save(out / "policy", "policy", params, dataclasses.replace(TINY, vocab_size=320), tokenizer)
    return out


def online(module, start: pathlib.Path, **more):
    small = {"policy": start / "policy", "iterations": 3, "batch": 8, "evaluate_every": 2, "held_out_prompts": 8}
    return dataclasses.replace(module.PRESETS["arithmetic"], **small | more)


def pairwise(module, start: pathlib.Path):
    """Of choices in a file, for an untrained model's own answers to sums are all wrong: 17 to learn from, so that the second
    epoch of pairs begins inside the third batch."""
    small = {"policy": start / "policy", "steps": 3, "batch": 8, "evaluate_every": 2, "held_out_prompts": 8}
    path = start / "choices.jsonl"
    rows = [
        {"prompt": row["prompt"], "chosen": row["answer"], "rejected": str(int(row["answer"]) + 1)}
        for row in sums.problems("train")[:20]
    ]
    sources.write_jsonl(path, rows)
    return dataclasses.replace(module.PRESETS["arithmetic"], choices=path, **small)


def own_texts(start: pathlib.Path):
    """Pre-training on a file so short that its second epoch begins inside the second batch."""
    path = start / "texts.txt"
    rows = [f"{row['prompt']} {row['answer']} is what row {i} says about it, at some length" for i, row in enumerate(PROBLEMS)]
    path.write_text("\n".join(rows) + "\n")
    return dataclasses.replace(pretrain.PRESETS["smoke"], texts=path, held_out=0.1, **MEASURED)


PROBLEMS = sums.problems("train")[:60]
MEASURED = {"steps": 3, "evaluate_every": 1}
ADAPTIVE = dataclasses.replace(ppo.ARITHMETIC.algorithm, kl_target=1.0)
STAGES = {
    "ppo": lambda start: online(ppo, start, batch=32, ema_decay=0.5, algorithm=ADAPTIVE),
    "grpo": lambda start: online(grpo, start),
    "rloo": lambda start: online(rloo, start),
    "raft": lambda start: online(raft, start),
    "reinforce": lambda start: online(reinforce, start, batch=32),
    "online_dpo": lambda start: online(online_dpo, start, batch=16),
    "dpo": lambda start: pairwise(dpo, start),
    "orpo": lambda start: pairwise(orpo, start),
    "kto": lambda start: pairwise(kto, start),
    "sft": lambda start: dataclasses.replace(sft.PRESETS["smoke"], init=start / "policy", keep="best", **MEASURED),
    "pretrain": lambda start: dataclasses.replace(pretrain.PRESETS["smoke"], **MEASURED),
    "own_texts": own_texts,
    "arithmetic": lambda start: dataclasses.replace(arithmetic.PRESETS["smoke"], steps=3),
    "reward_model": lambda start: dataclasses.replace(
        reward_model.PRESETS["smoke"],
        init=start / "policy",
        reference=start / "policy",
        dropout=0.1,
        held_out_texts=300,
        **MEASURED,
    ),
}
MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (ppo, grpo, rloo, raft, reinforce, online_dpo, dpo, orpo, kto, sft, pretrain, arithmetic, reward_model)
} | {"own_texts": pretrain}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("ppo", 1),
        *(pytest.param(name, 1, marks=pytest.mark.full) for name in STAGES if name != "ppo"),
        *(pytest.param(name, 8, marks=pytest.mark.full) for name in STAGES),
    ],
)
def test_a_stage_broken_at_every_step(start, tmp_path, one_step, use, name, data):
    """Optimizer, random keys, KL coefficient, averaged weights, the best step and the place in the data all come back."""
    use(data)
    config, run = STAGES[name](start), MODULES[name].run
    run(dataclasses.replace(config, out=tmp_path / "whole"))
    one_step()
    assert to_the_end(run, dataclasses.replace(config, out=tmp_path / "broken")) >= 3
    whole, broken = (ends(tmp_path / side) for side in ("whole", "broken"))
    assert whole.keys() == broken.keys() == {"params.safetensors", metrics.FILE}
    for file, content in whole.items():
        assert content == broken[file], file
    results = [json.loads((tmp_path / side / "result.json").read_text()) for side in ("whole", "broken")]
    assert results[0].get("best") == results[1].get("best")
    assert ("best" in results[0]) == (name != "arithmetic")  # which measures at its end alone
    kinds = [event["kind"] for event in events.read(tmp_path / "broken") if event["kind"] != "best"]
    assert kinds[:6] == ["started", "saved", "asked to end", "started", "restored", "saved"]
    assert kinds[-1] == "done"


@pytest.mark.full
@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo", "ppo"])
def test_a_stage_goes_on_with_another_number_of_devices(start, tmp_path, monkeypatch, one_step, use, name):
    """A step on one device, one on two, one on eight: the batches are the unbroken run's, and so are losses up to rounding."""
    seen: set[bytes] = set()
    original = sharding.shard_batch

    def told(batch, mesh):
        seen.update(np.asarray(x).tobytes() for x in jax.tree.leaves(batch) if np.asarray(x).dtype == np.int32)
        return original(batch, mesh)

    monkeypatch.setattr(sharding, "shard_batch", told)
    config, run = STAGES[name](start), MODULES[name].run
    use(1)
    run(dataclasses.replace(config, out=tmp_path / "whole"))
    whole = set(seen)
    seen.clear()
    one_step()
    for devices in (1, 2, 8):
        use(devices)
        with pytest.raises(SystemExit):
            run(dataclasses.replace(config, out=tmp_path / "broken"))
    use(4)
    run(dataclasses.replace(config, out=tmp_path / "broken"))
    assert seen == whole
    losses = [
        [row["loss/total"] for row in metrics.read(tmp_path / side) if "loss/total" in row] for side in ("whole", "broken")
    ]
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.01)  # weights and products in bfloat16


# ----------------------------------------------------------------------------------------------- facts from outside


def test_choices_that_come_while_a_run_is_interrupted_are_not_read(tmp_path):
    """The number of the store's last event is part of the run: who goes on reads what was read before."""
    db = store.open_store(tmp_path / "feedback.sqlite")
    add_choices(db, 0, 3)

    def read(out: pathlib.Path) -> list[str]:
        with Run.open(out, Toy(out), tensorboard=False) as run:
            rows = preference_data.read(tmp_path / "feedback.sqlite", run=run)
            run.restore({"w": jnp.zeros(2)})
            run.log(run.start, {"x": 1})
            run.maybe_save(run.start, {"w": jnp.ones(2)}, last=True)
            return [row["prompt"] for row in rows]

    first = read(tmp_path / "run")
    assert first == ["prompt 0", "prompt 1", "prompt 2"]
    add_choices(db, 3, 5)
    assert read(tmp_path / "run") == first
    assert len(read(tmp_path / "new")) == 5
    db.close()


def add_choices(db, low: int, high: int) -> None:
    for i in range(low, high):
        pair = store.Pair(f"prompt {i}", "good", "bad", "one", "two")
        store.add_pairs(db, [pair])
        store.record(db, [store.Choice(pair.id, "ann", "left", "a")])


@pytest.mark.parametrize("name", ["choices.jsonl", "choices"])
def test_a_file_of_choices_that_changed_is_refused(tmp_path, name):
    """Or a folder of them."""
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path, file = tmp_path / name, tmp_path / name
    if not path.suffix:
        path.mkdir()
        file = path / "train.jsonl"

    def read() -> None:
        with Run.open(tmp_path / "run", Toy(tmp_path / "run"), tensorboard=False) as run:
            preference_data.read(path, run=run)
            state = run.restore({"w": jnp.zeros(2)})
            run.log(run.start, {"x": 1})
            run.maybe_save(run.start, state, last=True)

    sources.write_jsonl(file, [row])
    read()
    read()
    sources.write_jsonl(file, [row, row | {"prompt": "q"}])
    with pytest.raises(ValueError, match=rf"{name}: changed since this run began to learn from it"):
        read()


def test_bad_lines_are_refused_or_left_out_counted_and_named(tmp_path, capsys):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    lines = [json.dumps(row), "{", json.dumps(row | {"chosen": "b"}), json.dumps(row | {"prompt": "q"}), '{"prompt": "p"}']
    path = tmp_path / "choices.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with Run.open(tmp_path / "run", Toy(tmp_path / "run"), tensorboard=False) as run:
        with pytest.raises(ValueError, match=r"choices\.jsonl:2: not JSON"):
            preference_data.read(path, run=run)
        found = preference_data.read(path, run=run, skip_bad=True)
    assert [each["prompt"] for each in found] == ["p", "q"]
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [each["line"] for each in rejects] == [2, 3, 5]
    assert "rejected: the same text as chosen" in rejects[1]["problem"]
    assert "choices.jsonl: 3 bad line(s) left out" in capsys.readouterr().err
    (event,) = events.read(tmp_path / "run")
    assert (event["kind"], event["lines"]) == ("left out", 3)


def test_rewards_in_children_are_those_of_this_process(start, tmp_path, use):
    """PPO on sums, with a reward of the user's own that hangs now and then in a child."""
    use(1)
    own = tmp_path / "own.py"
    own.write_text("def brevity(prompt, response, row):\n    return -0.01 * len(response)\n")
    config = online(ppo, start, iterations=1)
    figures = []
    for workers in (0, 2):
        limits = pool.Config(workers=workers, seconds=20.0, functions=(f"{own}:brevity",))
        out = tmp_path / str(workers)
        ppo.run(dataclasses.replace(config, out=out, pool=limits))
        figures.append(ends(out))
        row = metrics.read(out)[0]
        assert row["reward/brevity"] < 0
        total = row["reward/correct"] + 0.1 * row["reward/digits"] + row["reward/brevity"]
        assert row["reward/score"] == pytest.approx(total, abs=1e-5)
    assert figures[0] == figures[1]


def test_rewards_of_one_name_are_refused(start, tmp_path, use):
    use(1)
    config = online(ppo, start, out=tmp_path / "run", pool=pool.Config(functions=("mine.py:correct",)))
    with pytest.raises(ValueError, match=r"two rewards of one name \(correct\)"):
        ppo.run(config)
