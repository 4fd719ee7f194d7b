"""Types: what a `SamplingSpec` refuses, and that every batch type is a pytree that jit, vmap, scan and shardings accept."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.core import types

GOOD = {"temperature": 0.7, "max_tokens": 32, "stop": (2,)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.0}, r"temperature=0.0 must be > 0.*greedy=True"),
        ({"temperature": -1.0}, r"temperature=-1.0"),
        ({"temperature": float("nan")}, r"temperature=nan"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\].*1 keeps every token"),
        ({"top_p": 1.1}, r"top_p=1.1"),
        ({"min_p": -0.1}, r"min_p=-0.1 must be in \[0, 1\]"),
        ({"min_p": 1.5}, r"min_p=1.5"),
        ({"top_k": -1}, r"top_k=-1 must be >= 0"),
        ({"min_tokens": 33}, r"min_tokens=33, max_tokens=32"),
        ({"min_tokens": -1}, r"min_tokens=-1"),
        ({"max_tokens": 0}, r"max_tokens=0"),
    ],
)
def test_a_bad_spec_is_refused_with_value_and_limit(change, said):
    with pytest.raises(ValueError, match=said):
        types.SamplingSpec(**{**GOOD, **change})


def test_temperature_has_no_default():
    assert types.SamplingSpec.__dataclass_fields__["temperature"].default is dataclasses.MISSING


@pytest.mark.parametrize(
    ("change", "filtered"),
    [
        ({}, False),
        ({"temperature": 0.1}, False),  # the temperature, like the constraints, is part of the policy itself
        ({"min_tokens": 4, "forbidden": (0, 1)}, False),
        ({"top_k": 1}, True),
        ({"top_p": 0.99}, True),
        ({"min_p": 0.01}, True),
        ({"greedy": True}, True),
    ],
)
def test_filtered_says_whether_the_draw_differs_from_the_policy(change, filtered):
    assert types.SamplingSpec(**{**GOOD, **change}).filtered is filtered


def test_equal_specs_share_one_compiled_program():
    traced = []

    def f(x, spec):
        traced.append(spec)
        return x / spec.temperature

    jitted = jax.jit(f, static_argnums=1)
    for temperature in (0.7, 0.7, 0.5):
        jitted(jnp.ones(2), types.SamplingSpec(**{**GOOD, "temperature": temperature}))
    assert len(traced) == 2


def prompts(rows: int) -> types.Prompts:
    """Prompts whose every field names its row."""
    row = jnp.arange(rows, dtype=jnp.int32)
    return types.Prompts(tokens=jnp.tile(row[:, None], (1, 3)), length=row, uid=row, row=row)


def rollout(rows: int) -> types.Rollout:
    """A rollout of zeros with the optional fields absent."""
    i, f = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, 2))
    return types.Rollout(
        tokens=jnp.zeros((rows, 5), jnp.int32), prompt_len=i, response_len=i, finished=i > 0, group=i, sample=i, version=i,
        logprobs=f, sampled_logprobs=f,
    )  # fmt: skip


def every_type() -> list:
    """One value of each pytree type."""
    roll, one, two = rollout(4), jnp.zeros(4), jnp.zeros((4, 2))
    return [
        types.Term(one.sum(), one.sum() + 4),
        prompts(4),
        roll,
        types.Experience(roll, two, two, None, one, one, one),
        types.Preferences(jnp.zeros((4, 2, 5), jnp.int32), two > 0, two > 0, one, one > 0, one, one),
        types.Outputs(logprobs=two),
        types.TrainState(jnp.int32(0), {"w": one}, (), (), jax.random.key(0)),
    ]


@pytest.mark.parametrize("value", every_type(), ids=lambda v: type(v).__name__)
def test_every_type_is_a_pytree_of_anything(value):
    """Arrays, shapes, NumPy and shardings all stand in the same tree; a None field is no leaf."""
    assert type(jax.jit(lambda x: x)(value)) is type(value)
    shapes = jax.eval_shape(lambda x: x, value)
    assert jax.tree.structure(shapes) == jax.tree.structure(value)
    assert all(leaf is not None for leaf in jax.tree.leaves(value))
    host = jax.tree.map(lambda leaf: leaf if isinstance(leaf, float) else str(leaf), value)
    assert jax.tree.structure(host) == jax.tree.structure(value)


def test_prompts_go_through_vmap_and_scan():
    batch = prompts(4)
    np.testing.assert_array_equal(jax.vmap(lambda p: p.tokens.sum() + p.length)(batch), [0, 4, 8, 12])
    _, again = jax.lax.scan(lambda c, p: (c + p.length, p.replace(uid=p.uid + 1)), 0, batch)
    np.testing.assert_array_equal(again.uid, [1, 2, 3, 4])
    np.testing.assert_array_equal(again.tokens, batch.tokens)


def test_a_type_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompts(1).uid = jnp.zeros(1)


def test_terms_add_up_to_the_mean_whatever_the_split():
    values = jnp.array([1.0, 2.0, 3.0, 10.0])
    parts = [types.Term(part.sum(), jnp.float32(part.size)) for part in (values[:1], values[1:])]
    total = jax.tree.map(lambda a, b: a + b, *[(p.sum, p.count) for p in parts])
    assert total[0] / total[1] == values.mean()
    assert parts[0].coefficient == 1.0
