"""Experience: log-probs of learner and reference, values and bootstrap, each against a plain computation."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.core import sharding
from jaxrlhf.core.types import Experience, Prompts, Rollout, SamplingSpec
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.sampling import rollout

VOCAB = 40
CONFIG = TransformerConfig(
    vocab_size=VOCAB,
    width=16,
    layers=1,
    heads=2,
    kv_heads=2,
    head_width=8,
    mlp_width=24,
    max_length=16,
    tied_head=False,
)
MODEL = transformer.build(CONFIG)
SPEC = SamplingSpec(temperature=0.7, max_tokens=8, stop=(2, 3, 4), min_tokens=3, forbidden=(0, 1))
KEY = jax.random.key(5)


def language_model(seed: int):
    fresh = MODEL.init(jax.random.key(seed))
    return fresh | {"head": fresh["head"] * 20}  # clear preferences, as of a trained model


@pytest.fixture(scope="module")
def params():
    weight = jax.random.normal(jax.random.key(9), (16,))
    return {"policy": language_model(0), "value": {"weight": weight, "bias": jnp.float32(0.3)}}


@pytest.fixture(scope="module")
def frozen():
    return {"reference": language_model(1)}


def prompts(count: int = 12) -> Prompts:
    rng = np.random.default_rng(0)
    tokens, length = rng.integers(5, VOCAB, (count, 5)), rng.integers(1, 6, count)
    uid = np.arange(count)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), Prompts(tokens=tokens, length=length, uid=uid, row=uid))


@pytest.fixture(scope="module")
def collected(params, frozen) -> Experience:
    with jax.default_matmul_precision("highest"):
        return rollout.collect(MODEL, params, frozen, prompts(), SPEC, KEY, n=2, version=4)


def policy_logprobs(tree, experience: Experience) -> np.ndarray:
    """Float64 log-probs of the whole vocabulary [B, R, V], by hand: constraints, temperature, shift."""
    drawn = experience.rollout
    logits = np.asarray(MODEL.logits(tree, MODEL.hidden(tree, drawn.tokens)), np.float64) / SPEC.temperature
    logits[:, :, list(SPEC.forbidden)] = -1e9
    out = np.zeros((*drawn.logprobs.shape, VOCAB))
    for b, start in enumerate(drawn.prompt_len.tolist()):
        for t in range(int(drawn.response_len[b])):
            row = logits[b, start + t - 1].copy()
            if t < SPEC.min_tokens:
                row[list(SPEC.stop)] = -1e9
            out[b, t] = row - row.max() - np.log(np.exp(row - row.max()).sum())
    return out


def picked(logprobs: np.ndarray, experience: Experience) -> np.ndarray:
    drawn = experience.rollout
    out = np.zeros(logprobs.shape[:2])
    for b, start in enumerate(drawn.prompt_len.tolist()):
        for t in range(int(drawn.response_len[b])):
            out[b, t] = logprobs[b, t, int(drawn.tokens[b, start + t])]
    return out


def test_learner_and_reference_logprobs_are_those_of_the_policy(params, frozen, collected):
    assert 0 < collected.rollout.finished.sum() < 24  # both kinds of response are among them
    want = picked(policy_logprobs(params["policy"], collected), collected)
    np.testing.assert_allclose(collected.logprobs, want, atol=5e-5)  # float32 against float64, logits of size 6
    want = picked(policy_logprobs(frozen["reference"], collected), collected)
    np.testing.assert_allclose(collected.ref_logprobs, want, atol=5e-5)
    assert collected.rollout.version.tolist() == [4] * 24
    assert collected.score.tolist() == [0.0] * 24
    assert collected.weight.tolist() == [1.0] * 24


def test_sampler_and_learner_agree_so_that_the_first_ratio_is_one(collected):
    """At temperature 0.7 with forbidden ids and a minimum length, through prefill, cache and shared prompts."""
    assert float(jnp.abs(collected.logprobs - collected.rollout.logprobs).max()) < 5e-5
    assert float(jnp.abs(jnp.exp(collected.logprobs - collected.rollout.logprobs) - 1).max()) < 1e-4
    stats = rollout.stats(collected)
    assert 0 <= float(stats["rollout/sampler_gap"]) <= float(stats["rollout/sampler_gap_max"]) < 5e-5
    assert float(stats["rollout/length"]) == pytest.approx(np.mean(collected.rollout.response_len))
    assert float(stats["rollout/finished"]) == pytest.approx(np.mean(collected.rollout.finished))


def test_the_gap_is_a_mean_over_tokens_and_shows_a_difference(collected):
    off = collected.replace(logprobs=collected.rollout.logprobs.at[3, 1].add(0.5))
    stats = rollout.stats(off)
    assert float(stats["rollout/sampler_gap_max"]) == pytest.approx(0.5, abs=1e-6)
    assert float(stats["rollout/sampler_gap"]) == pytest.approx(0.5 / int(off.rollout.response_len.sum()), rel=1e-4)


def test_values_stand_before_each_token_and_bootstrap_after_a_cut_response(params, collected):
    drawn = collected.rollout
    hidden = np.asarray(MODEL.hidden(params["policy"], drawn.tokens), np.float64)
    value = hidden @ np.asarray(params["value"]["weight"], np.float64) + 0.3
    for b in range(24):
        start, length = int(drawn.prompt_len[b]), int(drawn.response_len[b])
        np.testing.assert_allclose(collected.values[b, :length], value[b, start - 1 : start - 1 + length], atol=2e-5)
        assert (np.asarray(collected.values[b, length:]) == 0).all()
        want = 0.0 if drawn.finished[b] else value[b, start + length - 1]
        np.testing.assert_allclose(collected.bootstrap[b], want, atol=2e-5)


def test_entropy_is_that_of_the_constrained_distribution(params, collected):
    logprobs, entropy = rollout.score_rollout(MODEL, params["policy"], collected.rollout, SPEC)
    np.testing.assert_allclose(logprobs, collected.logprobs, atol=5e-5)
    whole = policy_logprobs(params["policy"], collected)
    np.testing.assert_allclose(entropy, -(np.exp(whole) * whole).sum(-1), atol=5e-5)


def test_reused_logprobs_are_the_samplers(params, frozen, collected):
    reused = rollout.experience(MODEL, params, frozen, collected.rollout, SPEC, rollout.Options(reuse_sampler_logprobs=True))
    own = ~np.asarray(reused.checked)
    assert own.sum() == 24 - 8
    np.testing.assert_array_equal(reused.logprobs[own], collected.rollout.logprobs[own])
    np.testing.assert_allclose(reused.values, collected.values, atol=2e-5)
    np.testing.assert_allclose(reused.ref_logprobs, collected.ref_logprobs, atol=5e-5)


@pytest.mark.parametrize("reuse", [False, True])
def test_without_a_value_head_there_are_no_values(params, frozen, collected, reuse):
    plain = rollout.experience(MODEL, {"policy": params["policy"]}, frozen, collected.rollout, SPEC, rollout.Options(reuse))
    assert plain.values is None
    assert plain.bootstrap.tolist() == [0.0] * 24
    np.testing.assert_allclose(plain.logprobs, collected.logprobs, atol=5e-5)


def test_how_many_rows_are_scored_at_a_time_changes_nothing(params, frozen, collected):
    parts = rollout.experience(
        MODEL,
        params,
        frozen,
        collected.rollout,
        SPEC,
        rollout.Options(rows=5),  # 6 parts of 4; above, all at once
    )
    for name in ("logprobs", "ref_logprobs", "values", "bootstrap"):
        np.testing.assert_allclose(getattr(parts, name), getattr(collected, name), atol=5e-5, err_msg=name)


def test_what_stands_after_a_response_changes_nothing(params, frozen, collected):
    drawn = collected.rollout
    real = jnp.arange(drawn.tokens.shape[1]) < (drawn.prompt_len + drawn.response_len)[:, None]
    dirty = drawn.replace(tokens=jnp.where(real, drawn.tokens, 10**8))
    again = rollout.experience(MODEL, params, frozen, dirty, SPEC)
    for name in ("logprobs", "ref_logprobs", "values", "bootstrap"):
        np.testing.assert_allclose(getattr(again, name), getattr(collected, name), atol=1e-5, err_msg=name)


def test_experience_does_not_depend_on_devices(params, frozen):
    given = prompts(16)
    alone = rollout.collect(MODEL, params, frozen, given, SPEC, KEY, options=rollout.Options(rows=8))
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    trunk = sharding.shardings(transformer.param_specs(CONFIG), mesh)
    value = jax.device_put(params["value"], sharding.replicated(mesh))
    placed = {"policy": jax.device_put(params["policy"], trunk), "value": value}
    with jax.set_mesh(mesh):
        reference = {"reference": jax.device_put(frozen["reference"], trunk)}
        spread = rollout.collect(
            MODEL, placed, reference, sharding.shard_batch(given, mesh), SPEC, KEY, options=rollout.Options(rows=8)
        )
    np.testing.assert_array_equal(spread.rollout.tokens, alone.rollout.tokens)
    for name in ("logprobs", "ref_logprobs", "values", "bootstrap"):
        np.testing.assert_allclose(getattr(spread, name), getattr(alone, name), atol=5e-5, err_msg=name)
        assert getattr(spread, name).sharding.is_equivalent_to(sharding.batch_sharding(mesh), getattr(spread, name).ndim)


def test_one_program_for_each_shape_and_spec(params, frozen, collected):
    before = rollout._experience._cache_size()
    for _ in range(2):
        rollout.experience(MODEL, params, frozen, collected.rollout.replace(version=jnp.zeros(24, jnp.int32)), SPEC)
    assert rollout._experience._cache_size() <= before + 1


def products(params, frozen, options: rollout.Options, rows: int) -> tuple[int, int]:
    """Passes through a whole trunk for `rows` rows, and products with the head, in the compiled scoring program."""
    one_layer = transformer.build(dataclasses.replace(CONFIG, scan=False))
    drawn = rollout_of(rows)
    program = rollout._experience.lower(one_layer, SPEC, options, params, frozen["reference"], drawn).compile().as_text()
    ups = len(re.findall(rf"f32\[{rows * 13},24\]\S* dot\(", program))  # gate and up, of one layer
    assert ups % 2 == 0
    return ups // 2, len(re.findall(rf"f32\[{rows * 8},{VOCAB}\]\S* dot\(", program))


def rollout_of(rows: int) -> Rollout:
    zeros, logprobs = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, 8))
    tokens = jnp.ones((rows, 13), jnp.int32)
    return Rollout(tokens, zeros + 5, zeros + 3, zeros > 0, zeros, zeros, zeros, logprobs, logprobs)


def test_roles_are_scored_in_as_few_passes_as_they_have_trunks(params, frozen):
    policy, rows = params["policy"], 24
    critic = {"policy": policy, "critic": {"trunk": language_model(2), "head": params["value"]}}
    reused = rollout.Options(reuse_sampler_logprobs=True)
    assert products(params, frozen, rollout.Options(), rows) == (2, 2)  # policy with its value, reference; both read tokens
    assert products(critic, frozen, rollout.Options(), rows) == (3, 2)
    assert products({"policy": policy}, frozen, reused, rows) == (1, 1)  # the reference alone, but for the rows checked
    assert products(params, frozen, reused, rows) == (2, 1)  # the values need the policy's states, not its logits
    assert products(params, frozen, rollout.Options(exact_kl=True), rows) == (2, 2)  # the logits serve both


def test_reused_logprobs_are_checked_on_some_rows(params, frozen, collected):
    """Of a sampler that is off by 0.25 at every token, the rows checked tell; they learn from the learner's own."""
    drawn = collected.rollout
    off = drawn.replace(logprobs=drawn.logprobs + 0.25)
    options = rollout.Options(reuse_sampler_logprobs=True, checked=5)
    found = rollout.experience(MODEL, params, frozen, off, SPEC, options)
    assert found.checked.sum() == 5
    assert np.diff(np.flatnonzero(found.checked)).tolist() == [4] * 4  # spread over the batch
    mask = np.asarray(found.checked)
    np.testing.assert_allclose(found.logprobs[mask], collected.logprobs[mask], atol=1e-5)
    np.testing.assert_array_equal(found.logprobs[~mask], off.logprobs[~mask])
    stats = rollout.stats(found)
    assert float(stats["rollout/sampler_gap"]) == pytest.approx(0.25, abs=1e-4)
    assert float(stats["rollout/sampler_gap_max"]) == pytest.approx(0.25, abs=1e-3)
    assert rollout.stats(collected)["rollout/sampler_gap"] < 1e-4
