"""What is told of programs is what jax compiled; strict runs end at the call that would compile, with its name and reason."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import ROOT, environment

from jaxrlhf.training import programs, timing
from jaxrlhf.training.programs import Program, Programs

THREE, FOUR = np.ones(3, np.float32), np.ones(4, np.float32)


@pytest.fixture
def listening():
    """What is heard while a test runs."""
    found = Programs(show=False).open()
    yield found
    found.close()


def test_each_program_once_with_its_name_stage_and_seconds(listening):
    inner = jax.jit(lambda x: jnp.tanh(x) + jnp.arange(x.size))

    @jax.jit
    def outer(x):
        return inner(x).sum() + inner(2 * x).sum()

    with listening.at("update", 7):
        outer(THREE)
        outer(THREE)
    outer(FOUR)
    assert [(p.name, p.during, p.step) for p in listening.found] == [("outer", "update", 7), ("outer", "start", None)]
    first = listening.found[0]
    assert min(first.trace, first.lower, first.compile) > 0
    # What was traced within `outer` is not added to it again.
    assert first.trace + first.lower + first.compile <= listening.seconds


def test_what_another_thread_compiles_is_told_and_costs_this_one_nothing(listening):
    other = threading.Thread(target=lambda: jax.jit(lambda x: x * 3)(THREE))
    other.start()
    other.join()
    assert len(listening.found) == 1
    assert listening.seconds == 0


def test_seconds_are_those_of_the_outermost_span():
    """As jax tells them: a function traced within another, whose time is in the outer one's."""
    found, trace, compile_ = Programs(show=False), *list(programs._SPANS)[::2]
    found.open().close()
    before = found.seconds
    found._begins(trace, 0.0, fun_name="outer")
    for _ in range(3):
        found._begins(trace, 0.0, fun_name="inner")
        time.sleep(0.02)
        found._ends(trace, 0.02, fun_name="inner")
    found._ends(trace, 0.06, fun_name="outer")
    assert 0.06 <= found.seconds - before < 0.12, "not three times what the loop took"
    found._begins(compile_, 0.0, fun_name="jit(outer)")
    found._ends(compile_, 0.5, fun_name="jit(outer)")
    assert [(p.name, p.trace, p.compile) for p in found.found] == [("outer", 0.06, 0.5)]


def test_what_is_compiled_ahead_is_found_by_the_call_that_comes_later(listening):
    """Once each, in order, in another thread; the seconds of the thread that waits are not the compiler's events."""
    double, total = jax.jit(lambda x: 2 * x), jax.jit(lambda x: x.sum())
    shape = jax.ShapeDtypeStruct((6,), jnp.float32)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    order = []

    def first() -> None:
        order.append(double.lower(shape).compile().output_shardings)

    def second() -> None:
        order.append("second")
        total.lower(jax.ShapeDtypeStruct((6,), jnp.float32, sharding=place)).compile()

    listening.ahead({"first": first, "second": second}, contextlib.nullcontext)
    assert listening.wait("second")
    assert not listening.wait("second"), "waited for once"
    assert order[1] == "second"
    assert [p.during for p in listening.found] == ["ahead", "ahead"]
    assert float(total(jax.device_put(double(np.ones(6, np.float32)), place))) == 12
    assert len(listening.found) == 2, "nothing was compiled again"
    assert listening.seconds == 0


def test_a_job_that_fails_ahead_fails_where_it_is_waited_for():
    """And so do those after it, which need what it gives."""
    found = Programs(show=False)

    def fails() -> None:
        raise ValueError("no such program")

    done = []
    found.ahead({"score": fails, "update": lambda: done.append(1)}, contextlib.nullcontext)
    for name in ("update", "score"):
        with pytest.raises(ValueError, match="no such program"):
            found.wait(name)
    assert not done
    assert not found.wait("another")


def test_after_closing_nothing_is_heard(tmp_path):
    found = Programs(tmp_path, show=False).open()
    jax.jit(lambda x: x - 5)(THREE)
    found.close()
    jax.jit(lambda x: x - 6)(THREE)
    assert len(found.found) == 1
    [row] = json.loads((tmp_path / programs.FILE).read_text())["programs"]
    assert Program(**row) == found.found[0]
    assert not programs.explaining()


CACHED = """
import jax, json, numpy as np
from jaxrlhf.training.programs import Programs
found = Programs(show=False).open()
jax.jit(lambda x: (x @ x).sum())(np.ones((8, 8), np.float32))
print(json.dumps([p.cached for p in found.found]))
"""


def test_what_the_persistent_cache_had(tmp_path):
    """A second process reads what the first compiled; without a cache neither is said."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    told = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CACHED], env=environment() | cache, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout))
    assert told == [[False], [True]]


def steps(clock: timing.Clock, sizes: list[np.ndarray], function, every: int = 1) -> int:
    """Steps that run `function`, counted; a judgement, of its own program, every `every` steps."""
    judged, done = jax.jit(lambda x: (x * 7).max()), 0
    for i in clock.steps(range(len(sizes)), len(sizes)):
        with clock.within("update"):
            function(sizes[i])
        if i % every == every - 1:
            with clock.within("evaluate"):
                judged(THREE)
        done += 1
    return done


def strict() -> timing.Clock:
    clock = timing.Clock(timing.Options(strict=True))
    clock.programs.open()
    return clock


def test_a_strict_run_refuses_a_second_shape_with_name_and_reason():
    clock, calls = strict(), []

    @jax.jit
    def train_step(x):
        calls.append(x.shape)
        return x.sum()

    try:
        with pytest.raises(ValueError, match=r"strict: 'train_step' .* at step 2, update, .*now f32\[4\] and before f32\[3\]"):
            steps(clock, [THREE, THREE, FOUR], train_step)
        assert [p.name for p in clock.programs.found if p.name == "train_step"] == ["train_step"], "it was not compiled"
        train_step(FOUR)  # the loop has ended, and what follows it may compile
    finally:
        clock.programs.close()
    assert not programs.explaining()


def test_a_strict_run_lets_each_stage_compile_in_its_first_step():
    """A judgement that comes first at step 2 has its programs then; the same stage has no others later."""
    clock = strict()
    try:
        assert steps(clock, [THREE] * 6, jax.jit(lambda x: x.sum()), every=3) == 6
    finally:
        clock.programs.close()


def test_a_run_that_is_not_strict_compiles_when_it_must():
    clock = timing.Clock()
    clock.programs.open()
    try:
        assert steps(clock, [THREE, FOUR], jax.jit(lambda x: x.prod())) == 2
    finally:
        clock.programs.close()


def test_the_table_has_the_longest_first_and_the_sum_of_the_rest():
    found = [
        Program("small", "start", None, 0.01, 0.01, 0.02, False),
        Program("advance", "rollout", 0, 0.1, 0.2, 1.0, True),
        Program("train_step", "update", 0, 0.5, 0.5, 2.0, False),
    ]
    lines = [line.split() for line in programs.table(found).splitlines()]
    assert lines[0] == ["program", "during", "trace", "s", "lower", "s", "compile", "s", "cache"]
    assert lines[1] == ["train_step", "update", "0.50", "0.50", "2.00", "compiled"]
    assert lines[2] == ["advance", "rollout", "0.10", "0.20", "1.00", "read"]
    assert lines[3] == ["1", "smaller", "ones", "0.01", "0.01", "0.02"]
    assert lines[4] == ["3", "in", "all", "0.61", "0.71", "3.02", "1", "of", "3", "read"]
