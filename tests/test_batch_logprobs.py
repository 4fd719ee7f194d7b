"""Log-probs of given rows, computed ahead of training: against a plain computation, one token at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import preference_cases as cases
import pytest

from jaxrlhf.core import sharding
from jaxrlhf.core.types import SamplingSpec
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.sampling import rollout

PARAMS = jax.jit(cases.MODEL.init)(jax.random.key(0))
PLAIN = SamplingSpec(1.0, cases.WIDTH, ())
SPEC = SamplingSpec(0.7, cases.WIDTH, (2,), min_tokens=2, forbidden=(0, 1))


def by_hand(given, spec: SamplingSpec) -> np.ndarray:
    """Float64 log-probs [ROWS, 2, WIDTH]."""
    out = np.zeros((cases.ROWS, 2, cases.WIDTH))
    for row, side in np.ndindex(cases.ROWS, 2):
        tokens = given.tokens[row, side][None]
        logits = np.asarray(cases.MODEL.logits(PARAMS, cases.MODEL.hidden(PARAMS, tokens)), np.float64)[0]
        for t in range(int(given.response_len[row, side])):
            at = int(given.prompt_len[row, side]) + t
            z = logits[at - 1] / spec.temperature
            z[list(spec.forbidden)] = -1e30
            if t < spec.min_tokens:
                z[list(spec.stop)] = -1e30
            out[row, side, t] = z[int(tokens[0, at])] - z.max() - np.log(np.exp(z - z.max()).sum())
    return out


def pairs(seed: int, low: int = 0):
    """Pairs whose tokens are `low` or more."""
    given = cases.preferences(seed)
    return given.replace(tokens=jnp.maximum(given.tokens, low))


@pytest.mark.parametrize("rows", [4, 5, 16, 32])  # 16 rows in all: parts, parts with filling, all at once
def test_plain_softmax_of_pairs(rows):
    given = pairs(0)
    found = rollout.batch_logprobs(cases.MODEL, PARAMS, given, cases.WIDTH, rows=rows)
    np.testing.assert_allclose(found, by_hand(given, PLAIN), atol=2e-5)  # float32 log-softmax


def test_of_the_policy_that_a_spec_describes():
    given = pairs(1, low=3)  # no token that the spec makes impossible
    found = rollout.batch_logprobs(cases.MODEL, PARAMS, given, cases.WIDTH, SPEC)
    np.testing.assert_allclose(found, by_hand(given, SPEC), atol=2e-5)


def test_single_rows_host_arrays_and_a_wider_result():
    given = pairs(2)
    one = jax.tree.map(lambda x: np.asarray(x)[:, 0] if x.ndim > 1 else np.asarray(x), given)
    found = rollout.batch_logprobs(cases.MODEL, PARAMS, one, cases.WIDTH + 2)
    np.testing.assert_allclose(found[:, : cases.WIDTH], by_hand(given, PLAIN)[:, 0], atol=2e-5)
    assert not np.asarray(found[:, cases.WIDTH :]).any()


def test_what_stands_past_the_end_changes_nothing():
    given = pairs(3)
    real = jnp.arange(cases.T) < (given.prompt_len + given.response_len)[..., None]
    dirty = given.replace(tokens=jnp.where(real, given.tokens, 10**8))
    clean, spoiled = (rollout.batch_logprobs(cases.MODEL, PARAMS, x, cases.WIDTH) for x in (given, dirty))
    np.testing.assert_array_equal(clean, spoiled)


def test_devices_change_nothing():
    given = pairs(4)
    config = TransformerConfig(cases.VOCAB, 8, 1, 2, 2, 4, 16, 12, remat="none")
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(PARAMS, sharding.shardings(transformer.param_specs(config), mesh))
    with jax.set_mesh(mesh):
        spread = rollout.batch_logprobs(cases.MODEL, placed, sharding.shard_batch(given, mesh), cases.WIDTH, rows=8)
    np.testing.assert_allclose(spread, rollout.batch_logprobs(cases.MODEL, PARAMS, given, cases.WIDTH), atol=2e-5)


def test_a_response_without_room_is_refused():
    with pytest.raises(ValueError, match=f"a response has {cases.WIDTH} tokens, more than width={cases.WIDTH - 1}"):
        rollout.batch_logprobs(cases.MODEL, PARAMS, pairs(5), cases.WIDTH - 1)
