"""Reward functions in child processes: whatever one does costs its own response, and nothing is left of it."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxrlhf.core.types import Rollout
from jaxrlhf.rewards import functions, pool

HERE = pathlib.Path(__file__).parent
HOSTILE = {"hostile": pool.Source(f"{HERE / 'hostile_rewards.py'}:score")}
LIMITS = pool.Config(workers=2, seconds=1.0, memory_mb=64)


def items(*responses: str, seconds: str = "1") -> list[pool.Item]:
    return [("prompt", response, {"seconds": seconds}) for response in responses]


def processes(word: str) -> list[int]:
    """Processes with the word in their command line."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def is_alive(pid: int) -> bool:
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(true, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


@pytest.fixture
def hostile():
    with pool.open_pool(HOSTILE, LIMITS) as opened:
        yield opened["hostile"].pool


def test_values_are_those_of_the_function_in_order(hostile):
    words = ["x" * (i % 40) for i in range(300)]
    values, causes = hostile.score("hostile", items(*words))
    assert values == [len(word) for word in words]
    assert causes == {}
    assert hostile.killed == 0


def test_each_fault_costs_its_own_response_and_is_named(hostile):
    bad = ("raises", "hangs", "ends", "exits", "crashes", "leaks", "object", "nan", "none")
    mixed = [word for pair in zip(bad, ("good",) * len(bad), strict=True) for word in pair]
    values, causes = hostile.score("hostile", items(*mixed))
    assert values[1::2] == [4.0] * len(bad)
    assert {mixed[i]: cause for i, cause in causes.items()} == {
        "raises": "raised ZeroDivisionError: division by zero",
        "hangs": "took longer than 1 s",
        "ends": "ended its process (exit code 3)",
        "exits": "raised SystemExit: 4",
        "crashes": "ended its process (signal 11)",
        "leaks": "raised MemoryError: ",
    }
    assert "object object" in values[mixed.index("object")]  # which `apply` finds to be no number
    assert np.isnan(values[mixed.index("nan")])
    assert values[mixed.index("none")] == "None"
    assert hostile.killed == 4  # hangs, ends, crashes, leaks
    assert hostile.score("hostile", items("again"))[0] == [5.0]  # and the pool is whole


@pytest.mark.full  # a time: only where the machine is otherwise idle
def test_a_response_that_hangs_is_given_up_after_its_limit(hostile):
    hostile.score("hostile", items("warm"))
    started = time.monotonic()
    assert hostile.score("hostile", items("hangs"))[1] == {0: "took longer than 1 s"}
    took = time.monotonic() - started
    assert 1.0 <= took < 2.0, took  # what is promised: at most the limit and one second


def test_a_child_that_leaks_is_stopped_at_its_limit(hostile):
    assert hostile.score("hostile", items("takes 200 MB")) == ([None], {0: "raised MemoryError: "})
    with pool.open_pool(HOSTILE, pool.Config(workers=1, memory_mb=400)) as opened:
        assert opened["hostile"].pool.score("hostile", items("takes 200 MB")) == ([200.0], {})


def test_nothing_is_left_of_what_was_killed():
    mark = f"60.{os.getpid():07d}"
    with pool.open_pool(HOSTILE, LIMITS) as opened:
        _, causes = opened["hostile"].pool.score("hostile", items("hangs with a child", seconds=mark))
        assert causes == {0: "took longer than 1 s"}
        assert wait_until(lambda: not processes(mark)), "what the function started lives on"
        pids = [child.process.pid for child in opened["hostile"].pool._children]
        assert len(pids) >= LIMITS.workers
    assert not any(is_alive(pid) for pid in pids)


def test_children_die_with_a_parent_that_is_killed():
    program = f"""
import os, signal
from jaxrlhf.rewards import pool

with pool.open_pool({{"hostile": pool.Source({HOSTILE["hostile"].place!r})}}, pool.Config(workers=2)) as opened:
    print(*[child.process.pid for child in opened["hostile"].pool._children], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 3, done.stderr
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_rubbish_on_the_channel_is_not_believed():
    sources = {"stream": pool.Source(f"{HERE / 'hostile_rewards.py'}:stream")}
    with pool.open_pool(sources, LIMITS) as opened:
        values, causes = opened["stream"].pool.score("stream", items("a"))
        assert values == [None]
        assert causes[0] in ("answered rubbish", "took longer than 1 s")


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("nonsense", "names no function"),
        ("no/such/file.py:score", "no/such/file.py"),
        ("no_such_module_here:score", "no_such_module_here"),
        (f"{HERE / 'hostile_rewards.py'}:missing", "missing"),
        (f"{HERE / 'hostile_rewards.py'}:NOT_A_FUNCTION", "is a int, not a function"),
    ],
)
def test_a_function_that_is_not_there_is_refused_at_the_start(place, told):
    with pytest.raises(ValueError, match=told), pool.open_pool({"own": pool.Source(place)}, LIMITS):
        pass


@pytest.mark.parametrize("limits", [{"workers": 0}, {"workers": 1, "seconds": 0.0}, {"workers": 1, "memory_mb": 1}])
def test_limits_that_are_none_are_refused(limits):
    told = pytest.raises(ValueError, match="need workers >= 1, seconds > 0 and memory_mb >= 16")
    with told, pool.open_pool(HOSTILE, pool.Config(**limits)):
        pass


def rollout(responses: list[str]) -> Rollout:
    """Rows whose tokens are characters."""
    count, width = len(responses), max(map(len, responses)) + 1
    tokens = np.zeros((count, width), np.int32)
    for row, response in enumerate(responses):
        tokens[row, 1 : 1 + len(response)] = [ord(c) for c in response]
    ones, zeros, nothing = np.ones(count, np.int32), np.zeros(count, np.int32), np.zeros((count, width), np.float32)
    lengths = np.array([len(response) for response in responses], np.int32)
    return Rollout(tokens, ones, lengths, ones == 1, zeros, zeros, zeros, nothing, nothing)


def test_rows_that_a_child_could_not_score_are_left_out_counted_and_named(hostile):
    def decode(tokens: list[int]) -> str:
        return "".join(map(chr, tokens))

    with pytest.warns(UserWarning, match=r"reward 'own' could not score 2 of 4 .*row 1 .*: took longer than 1 s"):
        scores = functions.apply(pool.Remote(hostile, "hostile"), rollout(["ab", "hangs", "abc", "nan"]), decode, name="own")
    assert jax.tree.map(list, (scores.score, scores.weight)) == ([2.0, 0.0, 3.0, 0.0], [1.0, 0.0, 1.0, 0.0])
    total, figures = functions.weighted_sum({"own": scores}, {"own": 1.0})
    assert figures["reward/faults"] == 2
    assert list(total.weight) == [1.0, 0.0, 1.0, 0.0]
