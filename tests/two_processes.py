"""One process of a job of two, as tests/test_processes.py starts it: two_processes.py WHAT FOLDER [flags of the job]."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import sameness

from jaxrlhf.core import processes, sharding
from jaxrlhf.core.sharding import MeshConfig, ParamSpec
from jaxrlhf.core.types import Rollout
from jaxrlhf.data import conversations
from jaxrlhf.rewards import functions, pool
from jaxrlhf.training import checkpoint, cli, events, session
from jaxrlhf.training.run import Run


def joined(folder: Path) -> None:
    """Which process of how many this is, as one that a launcher started knows."""
    found = {
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "largest": processes.largest(jax.process_index()),
    }
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(found))


def agreed(folder: Path) -> None:
    """What one process knows, all learn; arrays go to the devices of all and come back; both write one checkpoint."""
    me = jax.process_index()
    assert processes.by_first(lambda: {"of": me, "number": np.float32(0.5)}) == {"of": 0, "number": 0.5}
    raised = {ValueError: (ValueError, ValueError), OSError: (OSError, ValueError), KeyError: (KeyError, RuntimeError)}
    for kind, seen in raised.items():  # bad input is bad input on all
        with pytest.raises(seen[me], match="no such thing"):
            processes.by_first(lambda kind=kind: _raise(kind))
    assert processes.largest(me, 7 - me) == (1, 7)
    (whole,) = processes.added(np.arange(4.0) * (np.arange(4) % 2 == me))
    np.testing.assert_array_equal(whole, np.arange(4.0))
    mesh = sharding.make_mesh(MeshConfig(fsdp=4))
    batch = {"tokens": np.arange(24).reshape(8, 3), "length": np.arange(8.0)}
    placed = sharding.shard_batch(batch, mesh)
    assert not placed["tokens"].is_fully_addressable
    assert placed["length"].dtype == np.float32
    jax.tree.map(np.testing.assert_array_equal, processes.to_host(placed), batch)
    assert [int(shard.data[0, 0]) for shard in placed["tokens"].addressable_shards] == ([0, 6] if me == 0 else [12, 18])
    _alike()
    _score(mesh, folder)
    _pool_of_one_alone(mesh, folder)
    _rejects(folder)
    _checkpoint(mesh, folder)
    _stopped(mesh, folder)
    _preempted(mesh, folder / "preempted")


def _raise(kind: type[Exception]) -> None:
    raise kind("no such thing")


def _alike() -> None:
    """What one process alone raises ends both, with its words."""
    me = jax.process_index()
    assert processes.alike(lambda: me) == me
    raised = {ValueError: ValueError, OSError: ValueError, KeyError: RuntimeError}
    for who in (0, 1):
        for kind, seen in raised.items():
            own = r"no such thing" if me == who else rf"no such thing.* \(said by process {who}\)"
            with pytest.raises(kind if me == who else seen, match=own):
                processes.alike(lambda kind=kind, who=who: _raise(kind) if me == who else None)


def _pool_of_one_alone(mesh: jax.sharding.Mesh, folder: Path) -> None:
    """A function that the second process cannot import; then children that it cannot start any more."""
    me, rows = jax.process_index(), np.arange(8, dtype=np.int32)
    own = folder / f"of{me}.py"
    own.write_text("def reward(prompt, response, row):\n    return 1.0\n" if me == 0 else "1 / 0\n")
    config = pool.Config(workers=1, seconds=60.0)
    with pytest.raises(ValueError, match=r"reward functions .*of1\.py:reward: ZeroDivisionError"):
        pool.open_pool({"own": pool.Source(f"{own}:reward")}, config).__enter__()
    own.write_text("def reward(prompt, response, row):\n    return 1.0\n")
    zeros, one = np.zeros((8, 1), np.float32), np.ones(8, np.int32)
    drawn = Rollout(np.stack([rows, rows], 1), one, one, one > 0, rows, rows, rows, zeros, zeros)
    drawn = sharding.shard_batch(drawn, mesh)
    with pool.open_pool({"own": pool.Source(f"{own}:reward")}, config) as given:
        if me == 1:
            given["own"].pool._setup = {"own": {"place": "gone.py:reward", "arguments": None}}
            for child in list(given["own"].pool._children):
                given["own"].pool._kill(child)
        with pytest.raises(ValueError, match=r"reward functions gone\.py:reward"):
            functions.apply(given["own"], drawn, lambda ids: str(ids[0]))


def _rejects(folder: Path) -> None:
    """Both read a file with a bad line; the first one alone writes which."""
    me, file = jax.process_index(), folder / f"chats{jax.process_index()}.jsonl"
    said = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
    file.write_text(json.dumps({"messages": said}) + "\n" + "{\n" * (me + 1))
    with Run.open(folder / "reading", MeshConfig(), tensorboard=False) as run:
        if me == 1:
            processes.wait("the first has read")
        assert len(conversations.read(file, run.rejects())) == 1
        if me == 0:
            processes.wait("the first has read")
        processes.wait("both have")
        run.left_out(file, run.out / "rejects.jsonl")
        assert len((folder / "reading" / "rejects.jsonl").read_text().splitlines()) == 1
        assert [path.name for path in run.out.glob("*rejects*")] == ["rejects.jsonl"]


def _score(mesh: jax.sharding.Mesh, folder: Path) -> None:
    """Each process scores its rows; both have all scores."""
    seen = []

    def reward(prompt: str, response: str, row: dict[str, Any]) -> float:
        seen.append(row["i"])
        if row["i"] == 5:
            raise KeyError("five")
        return float(response)

    rows, zeros = np.arange(8, dtype=np.int32), np.zeros((8, 1), np.float32)
    tokens, one = np.stack([rows, rows], 1), np.ones(8, np.int32)
    drawn = Rollout(tokens, one, one, one > 0, rows, rows, rows, zeros, zeros)
    given = functions.apply(reward, sharding.shard_batch(drawn, mesh), lambda ids: str(ids[0]), [{"i": i} for i in range(8)])
    np.testing.assert_array_equal(given.score, [0, 1, 2, 3, 4, 0, 6, 7])
    np.testing.assert_array_equal(given.weight, [1, 1, 1, 1, 1, 0, 1, 1])
    assert len(given.faults) == jax.process_index()  # the one who scored it tells of it
    assert seen == list(range(jax.process_index(), 8, 2))
    own = folder / f"own{jax.process_index()}.py"
    own.write_text("def reward(prompt, response, row):\n    return 1 / (row['i'] - 5)\n")
    with pool.open_pool({"own": pool.Source(f"{own}:reward")}, pool.Config(workers=1, seconds=60.0)) as given:
        rows = [{"i": i} for i in range(8)]
        told = functions.apply(given["own"], sharding.shard_batch(drawn, mesh), lambda ids: str(ids[0]), rows)
    np.testing.assert_allclose(told.score, [1 / (i - 5) if i != 5 else 0 for i in range(8)], rtol=1e-6)
    np.testing.assert_array_equal(told.weight, [1, 1, 1, 1, 1, 0, 1, 1])
    assert [fault.row for fault in told.faults] == [5] * jax.process_index()


def _state(mesh: jax.sharding.Mesh, axes: tuple[str | None, ...]) -> Any:
    places = sharding.shardings({"weight": ParamSpec((8, 4), axes, sharding.zeros)}, mesh)
    made = {"weight": np.arange(32, dtype=np.float32).reshape(8, 4)}
    with jax.set_mesh(mesh):
        return processes.from_host(made, places) | {"key": jax.device_put(jax.random.key(3), sharding.replicated(mesh))}


def _checkpoint(mesh: jax.sharding.Mesh, folder: Path) -> None:
    """Both write it, and read it onto another mesh."""
    state, where = _state(mesh, ("embed", None)), folder / "checkpoints"
    for step in (1, 2, 3):
        checkpoint.save(where, step, state)
    assert checkpoint.steps(where) == [2, 3]
    other = _state(sharding.make_mesh(MeshConfig(tensor=4)), (None, "mlp"))
    found, step = checkpoint.restore(where, jax.tree.map(lambda x: x, other))
    assert step == 3
    assert found["weight"].sharding == other["weight"].sharding
    np.testing.assert_array_equal(processes.to_host(found["weight"]), np.arange(32.0).reshape(8, 4))


def _stopped(mesh: jax.sharding.Mesh, folder: Path) -> None:
    """A signal that came to the second process alone ends both after the same step, saved."""
    state, me = _state(mesh, ("embed", None)), jax.process_index()
    where = folder / "run"
    reached = []

    def work() -> None:
        with Run.open(where, MeshConfig(), tensorboard=False) as run:
            assert run.once("asked", lambda: me) == 0  # of the first
            for step in run.steps(run.start, 50, "work"):
                reached.append(step)
                if me == 1 and step == 4:
                    signal.raise_signal(signal.SIGINT)
                if me == 0:
                    time.sleep(0.005)
                run.log(step, {"x": float(step)})
                run.maybe_save(step, state)

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 128 + signal.SIGINT
    assert reached[-1] == 4
    assert checkpoint.steps(where / "checkpoints") == [5]
    with Run.open(where, MeshConfig(), tensorboard=False) as run:
        run.restore(state)
        assert run.start == 5
        assert run.once("asked", lambda: 7) == 0  # as it was saved
        for step in run.steps(run.start, 7, "work"):
            run.log(step, {"x": float(step)})
        assert [row["step"] for row in run.metrics()] == [0, 1, 2, 3, 4, 5, 6]
        assert run.done({"by": me})["by"] == 0
    processes.wait("done")
    told = ["started", "saved", "asked to end", "started", "restored", "done"]
    assert [event["kind"] for event in events.read(where)] == told  # by one alone
    _out_of_time(folder / "late", state)
    _stopped_by_a_guard(mesh, folder / "bad")
    _best_of_one(mesh, folder / "measured")
    with pytest.raises(ValueError, match="not made by this program"):  # the first process looked; both are refused
        Run.open(folder / "checkpoints", MeshConfig(), tensorboard=False)


def _preempted(mesh: jax.sharding.Mesh, where: Path) -> None:
    """SIGTERM comes to the second process alone: both save after the same step, which jax's service names, and end."""
    state, me, reached = _state(mesh, ("embed", None)), jax.process_index(), []

    def work() -> None:
        with Run.open(where, MeshConfig(), tensorboard=False) as run:
            for step in run.steps(run.start, 5000, "work"):
                reached.append(step)
                if me == 1 and step == 4:
                    signal.raise_signal(signal.SIGTERM)
                time.sleep(0.005)
                run.log(step, {"x": float(step)})
                run.maybe_save(step, state)

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 128 + signal.SIGTERM
    assert processes.largest(reached[-1], -reached[-1]) == (reached[-1], -reached[-1])
    assert 4 <= reached[-1] < 4999
    assert checkpoint.steps(where / "checkpoints") == [reached[-1] + 1]
    told = events.read(where)[-1]
    assert (told["kind"], told["step"], told["reason"]) == ("asked to end", reached[-1] + 1, "stopped by SIGTERM")


def _best_of_one(mesh: jax.sharding.Mesh, where: Path) -> None:
    """The first process says which step is the best; both keep their part of it, and have it back."""
    state, me = _state(mesh, ("embed", None)), jax.process_index()
    with Run.open(where, MeshConfig(), tensorboard=False) as run:
        for step, value in enumerate((1.0, 3.0, 2.0)):
            state["weight"] = state["weight"] + 1
            run.best(step, "held_out/x", value + me * 10 * step, state)
        found = run.best_params(state)
        np.testing.assert_array_equal(processes.to_host(found["weight"]), np.arange(32.0).reshape(8, 4) + 2)
        assert run.done({})["best"]["step"] == 1
    assert checkpoint.steps(where / "best") == [1]


def _out_of_time(where: Path, state: Any) -> None:
    """The time of one process is up: both save after the same step and end."""
    reached = []
    minutes = 1e-9 if jax.process_index() == 1 else None

    def work() -> None:
        with session.use(session.Session(max_minutes=minutes)), Run.open(where, MeshConfig(), tensorboard=False) as run:
            for step in run.steps(run.start, 50, "work"):
                reached.append(step)
                run.maybe_save(step, state)

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == session.OUT_OF_TIME
    assert reached == [0]
    assert checkpoint.steps(where / "checkpoints") == [1]


def _stopped_by_a_guard(mesh: jax.sharding.Mesh, where: Path) -> None:
    """Both end; the batch, of which each held a part, is kept whole."""
    batch = sharding.shard_batch({"tokens": np.arange(16).reshape(8, 2)}, mesh)

    def work() -> None:
        with Run.open(where, MeshConfig(), tensorboard=False) as run:
            for step in run.steps(0, 9, "work"):
                run.log(step, {"optimizer/skipped_in_a_row": 3}, batch)

    with pytest.raises(ValueError, match=r"3 updates in a row; .* what it learned from is in bad_batch_"):
        work()
    processes.wait("kept")
    (kept,) = where.glob("bad_batch_*.npz")
    np.testing.assert_array_equal(np.load(kept)["['tokens']"], np.arange(16).reshape(8, 2))


def trained(folder: Path) -> None:
    """20 updates on recorded rollouts, and one live iteration, on four devices of two processes."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
    found = {"recorded": sameness.on(mesh, sameness.recorded()), "live": sameness.on(mesh, None, 1)}
    if processes.is_first():
        np.save(folder / "found.npy", np.array(found, dtype=object), allow_pickle=True)


if __name__ == "__main__":
    flags = sys.argv[3:]
    cli.join(**cli.job(flags))
    try:
        {"joined": joined, "agreed": agreed, "trained": trained}[sys.argv[1]](Path(sys.argv[2]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: the other one waits for this one, and this one's end would wait for the other
    print(f"{jax.process_index()} is done")
