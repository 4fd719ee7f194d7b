"""Online DPO: which responses of a rollout become a pair, and the KL-regularised optimum that it must reach."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import preference_cases as cases
import pytest
import reference
import reference_preferences

from jaxrlhf.algorithms import dpo
from jaxrlhf.core import masking, sharding
from jaxrlhf.core.types import Experience, Outputs, Rollout

PROMPTS, N, WIDTH = 8, 4, 5
B = PROMPTS * N
LONE, SILENT, EQUAL = 1, 2, 3  # prompts of which one response counts, none, and whose scores are all equal


def experience(seed: int, shuffled: bool = False) -> Experience:
    """Scored responses, N to a prompt; every token and log-prob names its row."""
    rng = np.random.default_rng(seed)
    group = np.repeat(10 + np.arange(PROMPTS), N)
    score, weight = rng.normal(size=B), (rng.random(B) < 0.8).astype(float)
    weight[group >= 14] = 1
    weight[group == 10 + LONE] = [0, 1, 0, 0]
    weight[group == 10 + SILENT] = 0
    weight[group == 10 + EQUAL], score[group == 10 + EQUAL] = 1, 0.5
    order = rng.permutation(B) if shuffled else np.arange(B)
    row = jnp.arange(B)
    rollout = Rollout(
        tokens=jnp.tile(row[:, None], (1, 3 + WIDTH)).astype(jnp.int32),
        prompt_len=jnp.full(B, 3),
        response_len=1 + row % WIDTH,
        finished=row % 2 == 0,
        group=jnp.asarray(group[order], jnp.int32),
        sample=row % N,
        version=row * 0,
        logprobs=jnp.zeros((B, WIDTH)),
        sampled_logprobs=jnp.zeros((B, WIDTH)),
    )
    ref = -jnp.asarray(rng.random((B, WIDTH)), jnp.float32)
    given, counts = jnp.asarray(score[order], jnp.float32), jnp.asarray(weight[order], jnp.float32)
    return Experience(rollout, ref, ref, None, jnp.zeros(B), given, counts)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_and_the_worst_of_each_prompt_are_a_pair(seed, shuffled):
    data = experience(seed, shuffled)
    made = dpo.from_experience(data, N)
    groups, scores, weights = (np.asarray(x).tolist() for x in (data.rollout.group, data.score, data.weight))
    expected = reference_preferences.best_and_worst(scores, groups, weights)
    assert [expected[10 + g] for g in (LONE, SILENT, EQUAL)] == [None] * 3
    for place, group in enumerate(sorted(expected)):
        pair = expected[group]
        assert made.weight[place] == (pair is not None), group
        if pair is not None:
            assert made.tokens[place, :, 0].tolist() == list(pair)
            np.testing.assert_array_equal(made.ref_logprobs[place], data.ref_logprobs[jnp.asarray(pair)])
            np.testing.assert_array_equal(made.response_len[place], data.rollout.response_len[jnp.asarray(pair)])
            assert made.label[place] == 1
    batch, _, metrics = dpo.prepare(made, (), dpo.DPO)
    assert metrics["preferences/pairs"] == sum(pair is not None for pair in expected.values()) >= 3
    assert batch.tokens.shape == (PROMPTS, 2, 3 + WIDTH)


def test_soft_labels_are_bradley_terry_probabilities():
    data = experience(3)
    made = dpo.from_experience(data, N, soft=True)
    scores, weights = np.asarray(data.score, np.float64), np.asarray(data.weight).tolist()
    chosen = reference_preferences.best_and_worst(scores.tolist(), np.asarray(data.rollout.group).tolist(), weights)
    for place, pair in enumerate(chosen.values()):
        if pair is not None:
            expected = reference_preferences.sigmoid(scores[pair[0]] - scores[pair[1]])
            assert made.label[place] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf, -np.inf])
def test_excluded_responses_are_not_read(garbage):
    data = experience(4)
    out = data.weight == 0
    dirty = data.replace(
        score=jnp.where(out, garbage, data.score), ref_logprobs=jnp.where(out[:, None], garbage, data.ref_logprobs)
    )
    clean, spoiled = (dpo.prepare(dpo.from_experience(x, N, soft=True), (), dpo.DPO) for x in (data, dirty))
    kept = np.asarray(clean[0].weight) > 0
    np.testing.assert_array_equal(clean[0].weight, spoiled[0].weight)
    for a, b in zip(jax.tree.leaves(clean[0]), jax.tree.leaves(spoiled[0]), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(np.asarray(a)[kept], np.asarray(b)[kept])
    cases.assert_bit_equal(clean[2], spoiled[2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_takes_its_prompt_out(bad):
    data = experience(5)
    row = 4 * N  # of a prompt whose responses all count
    assert dpo.from_experience(data, N).weight[4] == 1
    made = dpo.from_experience(data.replace(score=data.score.at[row].set(bad)), N, soft=True)
    assert made.weight[4] == 0
    assert np.isfinite(made.label).all()


def test_a_prompt_with_another_number_of_responses_is_left_out():
    data = experience(6)
    group = data.rollout.group.at[-1].set(99)  # the last prompt has 3 responses, another one 1
    made = dpo.from_experience(data.replace(rollout=data.rollout.replace(group=group)), N)
    assert made.weight[-1] == 0
    np.testing.assert_array_equal(made.weight[:-1], dpo.from_experience(data, N).weight[:-1])


def test_the_number_of_devices_changes_nothing():
    data = experience(7)
    made = jax.jit(lambda x: dpo.from_experience(x, N))
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=8))
    with jax.set_mesh(mesh):
        spread = made(sharding.shard_batch(data, mesh))
    for a, b in zip(jax.tree.leaves(made(data)), jax.tree.leaves(spread), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("n", [1, 0, 3, 64])
def test_a_number_of_responses_that_makes_no_pairs_is_refused(n):
    with pytest.raises(ValueError, match=f"n={n} responses a prompt of {B} rows"):
        dpo.from_experience(experience(8), n)


def test_tokens_of_others_are_refused():
    data = experience(9)
    held = data.replace(rollout=data.rollout.replace(written=jnp.ones((B, WIDTH), bool)))
    with pytest.raises(ValueError, match=r"Rollout\.written"):
        dpo.from_experience(held, N)


IDS, BETA, ROWS, ITERATIONS = 4, 0.5, 1024, 400
SEQUENCES = [(0,)] + [(a, b) for a in range(1, IDS) for b in range(IDS)]


@pytest.mark.parametrize("n", [2, 4])
def test_reaches_the_closed_form_optimum_of_the_regularised_bandit(n):
    """Pairs of the policy's own samples, judged with Bradley-Terry probabilities: of two, and of the extremes of four."""
    rng = np.random.default_rng(11)
    ref = {
        "first": jnp.asarray(rng.normal(size=IDS), jnp.float32),
        "second": jnp.asarray(rng.normal(size=(IDS, IDS)), jnp.float32),
    }
    prize = rng.normal(size=(IDS, IDS)).astype(np.float32)  # by (first, second) token; [0, 0] is the response (0)
    config = dpo.Config(beta=BETA)
    optimizer = optax.adam(optax.linear_schedule(0.05, 0.0, ITERATIONS))

    def read(params, tokens):
        first, second = jax.nn.log_softmax(params["first"]), jax.nn.log_softmax(params["second"])
        return jnp.stack([first[tokens[..., 0]], second[tokens[..., 0], tokens[..., 1]]], axis=-1)

    def iteration(carry, key):
        params, opt_state = carry
        keys = jax.random.split(key)
        a = jax.random.categorical(keys[0], jnp.broadcast_to(params["first"], (ROWS, IDS)))
        b = jnp.where(a == 0, 0, jax.random.categorical(keys[1], params["second"][a]))
        tokens, zeros = jnp.stack([a, b], axis=1).astype(jnp.int32), jnp.zeros(ROWS, jnp.int32)
        length = jnp.where(a == 0, 1, 2)
        mask = masking.length_mask(length, 2)
        logprobs, ref_logprobs = (masking.masked(read(tree, tokens), mask) for tree in (params, ref))
        group = jnp.arange(ROWS, dtype=jnp.int32) // n
        rollout = Rollout(tokens, zeros, length, b == 0, group, zeros, zeros, logprobs, logprobs)
        data = Experience(rollout, logprobs, ref_logprobs, None, jnp.zeros(ROWS), jnp.asarray(prize)[a, b], jnp.ones(ROWS))
        batch, _, _ = dpo.prepare(dpo.from_experience(data, n, soft=True), (), config)
        gradient = jax.grad(lambda p: cases.total(dpo.loss, Outputs(logprobs=read(p, batch.tokens)), batch, config))(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(jax.random.key(0), ITERATIONS)
    (params, _), _ = jax.jit(lambda start: jax.lax.scan(iteration, start, keys))((ref, optimizer.init(ref)))

    def distribution(params):
        first, second = (np.asarray(jax.nn.log_softmax(params[name]), np.float64) for name in ("first", "second"))
        return np.exp([first[s[0]] + (second[s] if len(s) == 2 else 0.0) for s in SEQUENCES])

    base, reached = distribution(ref), distribution(params)
    reward = np.array([prize[s if len(s) == 2 else (0, 0)] for s in SEQUENCES], np.float64)
    optimum = reference.regularised_optimum(base, reward, BETA)
    assert 0.5 * np.abs(base - optimum).sum() > 0.2  # there is something to learn
    # Labels are probabilities, so that only the choice of pairs is random: the fixed point itself is exact.
    assert 0.5 * np.abs(reached - optimum).sum() < 0.02
