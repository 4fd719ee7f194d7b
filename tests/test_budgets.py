"""What compiled programs move, copy and hold, against the committed budgets (`benchmarks/budgets.json`), which only fall."""

from __future__ import annotations

import copy
import importlib.util
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


def loaded(name: str) -> Any:
    """A module of benchmarks/, whose neighbours it finds while it is loaded."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(FOLDER))


bench = loaded("sharding")
hlo = bench.hlo
CASES = bench.CASES["cpu"]
PLAIN = [("2x2x2", ("ppo", "decode"))]


def within(name: str, programs: tuple[str, ...]) -> dict[str, Any]:
    case, shape = CASES[name]
    budget = bench.budgets("cpu").get(name, {})
    assert set(programs) <= set(budget), f"no budget for {bench.version()}: python benchmarks/sharding.py --target cpu --update"
    found = bench.counted(case, bench.mesh_of(shape, jax.devices()), programs)
    assert bench.over(found, budget, name) == []
    return found


@pytest.mark.parametrize(("name", "programs"), PLAIN)
def test_programs_stay_within_their_budgets(name, programs):
    found = within(name, programs)
    large = bench.programs.large(*with_mesh(name))
    # Weights are gathered before, not while tokens are written; what is left are numbers of each row.
    assert found["decode"]["collectives"]["all-gather"]["bytes"] < large
    # Of what comes out of an update only metrics are new.
    assert 0 <= found["ppo"]["memory"]["results"] - found["ppo"]["memory"]["aliased"] < 1000


def with_mesh(name: str) -> tuple[Any, jax.sharding.Mesh]:
    case, shape = CASES[name]
    return case, bench.mesh_of(shape, jax.devices())


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_every_program_stays_within_its_budget(name):
    within(name, bench.programs.NAMES)


@pytest.mark.full
def test_a_lost_constraint_goes_over_the_budget(monkeypatch):
    """The one on the residual stream, without which the partitioner moves activations."""
    kept = sharding.constrain
    monkeypatch.setattr(sharding, "constrain", lambda x, *axes: x if axes[-1:] == ("residual",) else kept(x, *axes))
    bench.programs.transformer.build.cache_clear()
    try:
        case, mesh = with_mesh("fsdp8")
        found = bench.counted(case, mesh, ("sft",))
    finally:
        bench.programs.transformer.build.cache_clear()
    assert bench.over(found, bench.budgets("cpu")["fsdp8"], "planted")


# ------------------------------------------------------------------------------------------------ the reader


def text_of(function: Any, *shapes: Any) -> str:
    return jax.jit(function).lower(*shapes).compile().as_text()


def test_collectives_count_as_often_as_a_loop_turns():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])

    def rows(width, spec):
        return jax.ShapeDtypeStruct(width, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    def layers(weights, x):
        def layer(x, weight):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ weight), NamedSharding(mesh, P("fsdp"))), None

        return jax.lax.scan(layer, x, weights)[0]

    text = text_of(layers, rows((6, 64, 64), (None, "fsdp")), rows((32, 64), ("fsdp",)))
    assert hlo.collectives(text) == {"all-gather": {"places": 1, "runs": 6, "bytes": 6 * 64 * 64 * 4}}


def test_large_copies_outside_of_fusions_are_seen():
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    text = text_of(lambda x: (x.T.reshape(-1), x + 1), x)
    (what, size, times), *_ = hlo.moved(text, 64 * 128 * 4)
    assert "transpose" in what or "copy" in what
    assert (size, times) == (64 * 128 * 4, 1)
    assert hlo.moved(text, 64 * 128 * 4 + 1) == []
    assert hlo.moved(text_of(lambda x: x * 2 + 1, x), 1) == []


def test_what_a_device_starts_is_counted_once():
    text = "\n".join(
        [
            "HloModule m",
            "%body (p: (f32[4])) -> (f32[4]) {",
            "  %s = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), dimensions={0}",
            "  %d = bf16[16,8]{1,0} all-gather-done(%s)",
            "  %t = ((f32[8], f32[4]), (f32[64], f32[32])) all-gather-start(%x, %y)",
            "}",
            "ENTRY %main (p: f32[4]) -> f32[4] {",
            '  %w = (f32[4]) while(%i), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}',
            "  %r = f32[16]{0} all-reduce(%z), to_apply=%add",
            "}",
        ]
    )
    assert hlo.collectives(text) == {
        "all-gather": {"places": 2, "runs": 6, "bytes": 3 * (16 * 8 * 2 + 96 * 4)},
        "all-reduce": {"places": 1, "runs": 1, "bytes": 64},
    }


# ------------------------------------------------------------------------------------------------ the budgets


def test_a_budget_bounds_and_only_falls(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "BUDGETS", tmp_path / "budgets.json")
    each = {
        "collectives": {"all-gather": {"places": 1, "runs": 6, "bytes": 100}},
        "moved": {"runs": 1, "bytes": 10},
        "memory": {"temporaries": 50, "results": 9, "aliased": 8},
    }
    assert bench.budgets("cpu") == {}
    bench.update("cpu", "case", {"sft": each})
    assert bench.over({"sft": each}, bench.budgets("cpu")["case"], "case") == []
    more = copy.deepcopy(each)
    more["collectives"]["all-gather"]["runs"], more["collectives"]["all-to-all"] = 7, {"places": 1, "runs": 1, "bytes": 4}
    more["memory"]["temporaries"] = 40
    said = bench.over({"sft": more}, bench.budgets("cpu")["case"], "case")
    assert said == [
        "case, sft: all-gather runs is 7, the budget is 6",
        "case, sft: all-to-all runs is 1, the budget is 0",
        "case, sft: all-to-all bytes is 4, the budget is 0",
    ]
    bench.update("cpu", "case", {"sft": more})
    limits = bench.budgets("cpu")["case"]["sft"]
    assert (limits["all-gather runs"], limits["temporaries"]) == (6, 40)
    assert "all-to-all runs" not in limits


def test_budgets_name_cases_and_programs_that_there_are():
    every = json.loads((FOLDER / "budgets.json").read_text())
    assert every
    for key, cases in every.items():
        target = key.partition(",")[0]
        assert set(cases) <= set(bench.CASES[target]), key
        assert all(set(programs) <= set(bench.programs.NAMES) for programs in cases.values()), key
