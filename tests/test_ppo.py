"""PPO: rewards of tokens, the batch made from a rollout, the clipped losses, and the optimum that it must reach."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from experiences import ROWS, WIDTH, experience, mask_of, spoil

from jaxrlhf.algorithms import ppo, shaping, surrogate
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Experience, Outputs, Rollout

PLAIN = ppo.Config()
STATE = ppo.init(dataclasses.replace(PLAIN, kl_coef=0.3))


def reference_prepare(data: Experience, config: ppo.Config, kl_coef: float):
    """Rewards, advantages and returns as the papers write them, row by row."""
    mask, finished = mask_of(data), np.asarray(data.rollout.finished)
    score = reference.shaped_score(np.asarray(data.score), finished, config.score)
    kl = reference.kl_estimates(np.asarray(data.logprobs), np.asarray(data.ref_logprobs), mask, config.kl_estimator)
    rewards = reference.token_rewards(score, kl, mask, kl_coef)
    if config.whiten_rewards:
        rewards = reference.whiten(rewards, mask, shift_mean=False, bessel=config.bessel)
    bootstrap = np.asarray(data.bootstrap) * (config.bootstrap & ~finished)
    advantages, returns = reference.gae(rewards, np.asarray(data.values), mask, bootstrap, config.gamma, config.lam)
    return reference.whiten(advantages, mask, bessel=config.bessel) if config.whiten_advantages else advantages, returns


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kl_estimator": "k2", "whiten_advantages": False},
        {"kl_estimator": "k3", "score": shaping.Config(missing_eos_penalty=0.0, scale=0.5)},
        {"whiten_rewards": True, "gamma": 0.9, "lam": 0.7, "bessel": True},
        {"bootstrap": True, "score": shaping.Config(clip=0.5, missing_eos="replace", missing_eos_penalty=0.25)},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_prepare_equals_the_reference(changes, holes):
    data, config = experience(0, holes), dataclasses.replace(PLAIN, **changes)
    batch, _, _ = ppo.prepare(data, STATE, config)
    advantages, returns = reference_prepare(data, config, 0.3)
    np.testing.assert_array_equal(batch.mask, mask_of(data))
    # Whitening divides by a float32 deviation: a few units in the last place of the largest element.
    np.testing.assert_allclose(batch.advantages, advantages, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.returns, returns, rtol=1e-4, atol=1e-5)


def test_the_score_stands_at_the_last_real_token():
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
    rewards = shaping.token_rewards(jnp.arange(1.0, 6.0), jnp.full((5, 4), 2.0), jnp.asarray(mask), jnp.float32(0.25))
    np.testing.assert_allclose(
        rewards,
        [[-0.5, -0.5, 0.5, 0], [-0.5, -0.5, -0.5, 1.5], [-0.5, 0, 2.5, 0], [0, 0, 3.5, 0], [0, 0, 0, 0]],
    )


@pytest.mark.parametrize(
    ("score", "finished", "clip", "expected"),
    [
        (2.0, True, None, 2.0),
        (2.0, False, None, 1.25),  # the penalty of 0.75 is taken off
        (2.0, True, 1.5, 1.5),
        (2.0, False, 1.5, 0.75),  # after the clip
        (-2.0, False, 1.5, -2.25),
    ],
)
def test_missing_eos_penalty_and_score_clip(score, finished, clip, expected):
    data = experience(1)
    data = data.replace(
        score=jnp.full(ROWS, score), rollout=data.rollout.replace(finished=jnp.full(ROWS, finished)), ref_logprobs=data.logprobs
    )
    config = dataclasses.replace(PLAIN, score=shaping.Config(missing_eos_penalty=0.75, clip=clip))
    _, _, metrics = ppo.prepare(data, ppo.init(config), config)
    rows = mask_of(data).any(1).sum()
    counted = int((data.weight > 0).sum())  # the empty row counts, and earns nothing
    assert metrics["reward/total"] == pytest.approx(expected * rows / counted, rel=1e-6)
    assert metrics["reward/score"] == pytest.approx(score, rel=1e-6)  # as the reward gave it


def test_metrics_of_prepare():
    data = experience(2)
    _, _, metrics = ppo.prepare(data, STATE, PLAIN)
    mask, counted = mask_of(data), np.asarray(data.weight) > 0
    logprobs, ref, values = (np.asarray(x) for x in (data.logprobs, data.ref_logprobs, data.values))
    _, returns = reference_prepare(data, PLAIN, 0.3)
    expected = {
        "policy/kl_ref": reference.kl_estimates(logprobs, ref, mask, "k1").sum(1)[counted].mean(),
        "policy/kl_coef": 0.3,
        "reward/score": np.asarray(data.score)[counted].mean(),
        "reward/score_std": np.asarray(data.score)[counted].std(),
        "value/explained_variance": 1 - reference.variance(returns - values, mask) / reference.variance(returns, mask),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name


def test_the_coefficient_adapts_only_with_a_target():
    data = experience(3)
    kl = float(ppo.prepare(data, ppo.init(PLAIN), PLAIN)[2]["policy/kl_ref"])
    fixed = ppo.prepare(data, STATE, PLAIN)[1]
    assert fixed.kl_coef == np.float32(0.3)
    config = dataclasses.replace(PLAIN, kl_target=5.0, kl_horizon=100.0)
    adapted = ppo.prepare(data, STATE, config)[1]
    sequences = int((data.weight > 0).sum())
    assert adapted.kl_coef == pytest.approx(reference.adaptive_kl(0.3, kl, sequences, 5.0, 100.0), rel=1e-6)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.9, 1.0, 1.1, 1.25, 1.4, 2.0])
def test_which_side_the_ratio_is_clipped_on(ratio, advantage):
    one = jnp.ones((1, 1), bool)

    def loss(log_ratio):
        return surrogate.clipped_policy(log_ratio, jnp.full((1, 1), advantage), one, 0.2, 0.3)[0].sum()

    at = jnp.log(jnp.full((1, 1), ratio))
    _, clipped = surrogate.clipped_policy(at, jnp.full((1, 1), advantage), one, 0.2, 0.3)
    # A good token is pushed up until 1 + clip_high, a bad one down until 1 - clip_low; the other sides stay free.
    limited = ratio > 1.3 if advantage > 0 else ratio < 0.8
    kept = (1.3 if advantage > 0 else 0.8) if limited else ratio
    assert loss(at) == pytest.approx(-advantage * kept, rel=1e-6)
    assert jax.grad(loss)(at)[0, 0] == pytest.approx(0.0 if limited else -advantage * ratio, rel=1e-6)
    assert bool(clipped[0, 0]) == limited


@pytest.mark.parametrize(
    ("value", "target", "clip", "expected", "gradient"),
    [
        (1.1, 2.0, 0.2, 0.405, -0.9),  # within the clip: plain
        (1.5, 2.0, 0.2, 0.32, 0.0),  # moved too far towards the target: the clipped error is larger, no gradient
        (1.5, 0.0, 0.2, 1.125, 1.5),  # moved away: the free error is larger
        (0.5, 0.0, 0.2, 0.32, 0.0),
        (0.5, 2.0, 0.2, 1.125, -1.5),
        (1.5, 2.0, None, 0.125, -0.5),
    ],
)
def test_value_clipping(value, target, clip, expected, gradient):
    def loss(value):
        return surrogate.clipped_value(value, jnp.ones((1, 1)), jnp.full((1, 1), target), jnp.ones((1, 1), bool), clip)[0].sum()

    assert loss(jnp.full((1, 1), value)) == pytest.approx(expected, rel=1e-5)
    assert jax.grad(loss)(jnp.full((1, 1), value))[0, 0] == pytest.approx(gradient, rel=1e-5)
    assert expected == pytest.approx(reference.value_token(value, 1.0, target, clip), rel=1e-9)


def trained(seed: int, holes: bool = False, config: ppo.Config = PLAIN) -> tuple[ppo.Batch, Outputs]:
    """A batch, and outputs of a policy that has moved away from it."""
    batch, _, _ = ppo.prepare(experience(seed, holes), ppo.init(config), config)
    rng = np.random.default_rng(seed + 100)
    moved, value, entropy = (jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32) for _ in range(3))
    return batch, Outputs(logprobs=batch.old_logprobs + 0.3 * moved, values=batch.old_values + 0.3 * value, entropy=entropy)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("value_clip", [0.2, None])
def test_loss_equals_the_reference(holes, value_clip):
    config = dataclasses.replace(PLAIN, value_clip=value_clip, entropy_coef=0.01)
    batch, outputs = trained(4, holes)
    terms, metrics = ppo.loss(outputs, batch, config)
    places = [place for place in np.ndindex(batch.mask.shape) if batch.mask[place]]
    new, old, advantages, values, old_values, returns = (
        np.asarray(x, np.float64)
        for x in (outputs.logprobs, batch.old_logprobs, batch.advantages, outputs.values, batch.old_values, batch.returns)
    )
    policy = [reference.ppo_token(new[p], old[p], advantages[p], 0.2) for p in places]
    value = [reference.value_token(values[p], old_values[p], returns[p], value_clip) for p in places]
    acted = [
        (advantages[p] > 0 and new[p] - old[p] > np.log(1.2)) or (advantages[p] < 0 and new[p] - old[p] < np.log(0.8))
        for p in places
    ]
    expected = {
        "loss/policy": (policy, 1.0),
        "loss/value": (value, 0.1),
        "loss/entropy": ([-float(outputs.entropy[p]) for p in places], 0.01),
        "policy/entropy": ([float(outputs.entropy[p]) for p in places], 1.0),
        "policy/ratio": ([np.exp(new[p] - old[p]) for p in places], 1.0),
        "policy/approx_kl": ([(new[p] - old[p]) ** 2 / 2 for p in places], 1.0),
        "policy/clip_fraction": (acted, 1.0),
    }
    for name, (numbers, coefficient) in expected.items():
        term = (terms | metrics)[name]
        assert term.count == len(places), name
        assert term.sum == pytest.approx(sum(numbers), rel=1e-4, abs=1e-5), name
        assert term.coefficient == coefficient, name


def test_before_the_first_update_the_ratio_is_one():
    batch, _ = trained(5)
    _, metrics = ppo.loss(Outputs(logprobs=batch.old_logprobs, values=batch.old_values), batch, PLAIN)
    assert metrics["policy/ratio"].sum == metrics["policy/ratio"].count > 0
    assert metrics["policy/clip_fraction"].sum == metrics["policy/approx_kl"].sum == metrics["value/clip_fraction"].sum == 0


def minimised(outputs: Outputs, batches: list[ppo.Batch], config: ppo.Config, slices=(slice(None),)):
    """What the train step minimises over microbatches: sums and counts added first, then divided."""
    parts = [
        ppo.loss(jax.tree.map(lambda x, i=i: x[i], outputs), batch, config)[0] for i, batch in zip(slices, batches, strict=True)
    ]
    return sum(
        parts[0][name].coefficient * sum(p[name].sum for p in parts) / sum(p[name].count for p in parts) for name in parts[0]
    )


@pytest.mark.parametrize("holes", [False, True])
def test_a_split_adds_up(holes):
    config = dataclasses.replace(PLAIN, entropy_coef=0.01)
    batch, outputs = trained(6, holes)
    slices = [slice(0, 1), slice(1, 2), slice(2, 8)]  # the second part holds the empty row alone
    parts = [jax.tree.map(lambda x, i=i: x[i], batch) for i in slices]
    whole = jax.jit(jax.value_and_grad(lambda x: minimised(x, [batch], config)))(outputs)
    split = jax.jit(jax.value_and_grad(lambda x: minimised(x, parts, config, slices)))(outputs)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf, -np.inf])
def test_masked_places_are_not_read(holes, garbage):
    config = dataclasses.replace(PLAIN, kl_target=6.0, whiten_rewards=True, bootstrap=True, entropy_coef=0.01)
    data = experience(7, holes)
    data = data.replace(ref_logprobs=-data.ref_logprobs)  # spoil() turns its sign, so that inf - inf arises too
    prepared = ppo.prepare(data, ppo.init(config), config)
    spoiled = ppo.prepare(spoil(data.replace(ref_logprobs=-data.ref_logprobs), garbage), ppo.init(config), config)
    for a, b in zip(jax.tree.leaves(prepared), jax.tree.leaves(spoiled), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)

    batch, outputs = trained(7, holes, config)
    dirty_outputs = jax.tree.map(lambda x: jnp.where(batch.mask, x, garbage), outputs)
    dirty_batch = batch.replace(
        **{
            name: jnp.where(batch.mask, getattr(batch, name), -garbage)
            for name in ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns", "importance")
        }
    )
    both = [jax.value_and_grad(minimised)(o, [b], config) for o, b in ((outputs, batch), (dirty_outputs, dirty_batch))]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)


def test_tokens_that_became_impossible_give_finite_numbers():
    batch, outputs = trained(8)
    for far in (-1e30, 1e30, 300.0, -300.0):  # -1e30: a token that the constraints forbid
        moved = Outputs(logprobs=batch.old_logprobs + far, values=outputs.values)
        value, gradient = jax.value_and_grad(minimised)(moved, [batch], PLAIN)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradient)))


def test_entropy_bonus_raises_entropy():
    batch, outputs = trained(9)
    gradient = jax.grad(minimised)(outputs, [batch], dataclasses.replace(PLAIN, entropy_coef=0.5))
    np.testing.assert_allclose(gradient.entropy, -0.5 * batch.mask / batch.mask.sum(), rtol=1e-6)


def test_prepare_under_jit_and_one_program():
    prepare = jax.jit(ppo.prepare, static_argnums=2)
    for seed in range(3):
        data = experience(seed)
        for a, b in zip(
            jax.tree.leaves(prepare(data, ppo.init(PLAIN), PLAIN)),
            jax.tree.leaves(ppo.prepare(data, ppo.init(PLAIN), PLAIN)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # fused sums add in another order
    assert prepare._cache_size() == 1


def test_the_number_of_devices_changes_nothing():
    """Whitening, the controller and every count are of the whole batch, not of a device's rows."""
    config = dataclasses.replace(PLAIN, kl_target=6.0, whiten_rewards=True)
    data = experience(10)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2))
    rng = np.random.default_rng(10)
    shift = jnp.asarray(0.3 * rng.normal(size=(ROWS, WIDTH)), jnp.float32)

    def everything(data, shift):
        batch, state, metrics = ppo.prepare(data, ppo.init(config), config)
        outputs = Outputs(logprobs=batch.old_logprobs + shift, values=batch.old_values + shift)
        return batch, state, metrics, ppo.loss(outputs, batch, config)

    one = jax.jit(everything)(data, shift)
    with jax.set_mesh(mesh):
        eight = jax.jit(everything)(*sharding.shard_batch((data, shift), mesh))
    assert len(eight[0].advantages.sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # sums over devices add in another order


def test_missing_parts_are_named():
    with pytest.raises(ValueError, match=r"Experience\.values"):
        ppo.prepare(experience(0).replace(values=None), ppo.init(PLAIN), PLAIN)
    batch, outputs = trained(0)
    with pytest.raises(ValueError, match=r"Outputs\.entropy"):
        ppo.loss(outputs.replace(entropy=None), batch, dataclasses.replace(PLAIN, entropy_coef=0.1))
    for name in ("logprobs", "values"):
        with pytest.raises(ValueError, match=rf"Outputs\.{name}"):
            ppo.loss(outputs.replace(**{name: None}), batch, PLAIN)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip": -0.1},
        {"kl_coef": -1.0},
        {"gamma": 1.1},
        {"lam": -0.1},
        {"kl_target": 0.0},
        {"value_clip": 0.0},
        {"epochs": 0},
        {"minibatches": 0},
        {"kl_horizon": 0.0},
    ],
    ids=str,
)
def test_impossible_configurations(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        dataclasses.replace(PLAIN, **wrong)


# The closed-form optimum. Responses of at most two tokens over four ids, id 0 ends one: (0), (a, 0) or (a, b), cut.
IDS, BETA, PENALTY = 4, 0.5, 0.4
SEQUENCES = [(0,)] + [(a, b) for a in range(1, IDS) for b in range(IDS)]


def sequence_table(first, second):
    """Of every response: first[a] + second[a, b], or first[0] alone where it ends at once."""
    return np.array([first[s[0]] + (second[s[0], s[1]] if len(s) == 2 else 0.0) for s in SEQUENCES])


def test_reaches_the_closed_form_optimum_of_the_regularised_bandit():
    rng = np.random.default_rng(11)
    ref = {
        "first": jnp.asarray(rng.normal(size=IDS), jnp.float32),
        "second": jnp.asarray(rng.normal(size=(IDS, IDS)), jnp.float32),
    }
    prize = np.zeros((IDS, IDS), np.float32)  # by (first, second) token; [0, 0] is the response (0)
    prize[:] = rng.normal(size=(IDS, IDS))
    prize_array = jnp.asarray(prize)
    rows, iterations = 1024, 300
    config = ppo.Config(
        kl_coef=BETA, score=shaping.Config(missing_eos_penalty=PENALTY), value_clip=None, value_coef=1.0, clip=0.2
    )
    optimizer = optax.adam(optax.linear_schedule(0.05, 0.0, iterations * 2))

    def tables(params):
        return jax.nn.log_softmax(params["first"]), jax.nn.log_softmax(params["second"])

    def read(params, tokens):
        first, second = tables(params)
        logprobs = jnp.stack([first[tokens[:, 0]], second[tokens[:, 0], tokens[:, 1]]], axis=1)
        return logprobs

    def values(params, tokens):
        return jnp.stack([jnp.broadcast_to(params["value_first"], (rows,)), params["value_second"][tokens[:, 0]]], axis=1)

    def iteration(carry, key):
        params, opt_state = carry
        keys = jax.random.split(key)
        a = jax.random.categorical(keys[0], jnp.broadcast_to(params["first"], (rows, IDS)))
        b = jax.random.categorical(keys[1], params["second"][a])
        ended = a == 0
        tokens = jnp.stack([a, b], axis=1).astype(jnp.int32)
        finished = ended | (b == 0)
        score = jnp.where(ended, prize_array[0, 0], prize_array[a, b])
        logprobs, zeros = read(params, tokens), jnp.zeros(rows, jnp.int32)
        rollout = Rollout(tokens, zeros, jnp.where(ended, 1, 2), finished, zeros, zeros, zeros, logprobs, logprobs)
        data = Experience(rollout, logprobs, read(ref, tokens), values(params, tokens), jnp.zeros(rows), score, jnp.ones(rows))
        batch, _, _ = ppo.prepare(data, ppo.init(config), config)

        def objective(params):
            outputs = Outputs(logprobs=read(params, tokens), values=values(params, tokens))
            return sum(t.coefficient * t.sum / t.count for t in ppo.loss(outputs, batch, config)[0].values())

        for _ in range(config.epochs):
            updates, opt_state = optimizer.update(jax.grad(objective)(params), opt_state, params)
            params = optax.apply_updates(params, updates)
        return (params, opt_state), None

    params = ref | {"value_first": jnp.float32(0.0), "value_second": jnp.zeros(IDS)}
    start = (params, optimizer.init(params))
    (params, _), _ = jax.jit(lambda start, keys: jax.lax.scan(iteration, start, keys))(
        start, jax.random.split(jax.random.key(0), iterations)
    )

    reached = np.exp(sequence_table(*(np.asarray(x, np.float64) for x in tables(params))))
    base = np.exp(sequence_table(*(np.asarray(x, np.float64) for x in tables(ref))))
    reward = np.array([prize[s if len(s) == 2 else (0, 0)] - (0.0 if s[-1] == 0 else PENALTY) for s in SEQUENCES], np.float64)
    optimum = reference.regularised_optimum(base, reward, BETA)

    def gained(p):
        return (p * reward).sum() - BETA * (p * np.log(p / base)).sum()

    assert reached.sum() == pytest.approx(1.0, abs=1e-5)
    # 1024 samples an iteration, the learning rate falling to 0: what is left is sampling noise.
    assert gained(optimum) - gained(base) > 0.3  # there is something to learn
    assert gained(reached) > gained(base) + 0.99 * (gained(optimum) - gained(base))
    assert np.abs(reached - optimum).max() < 0.02
    kl_reached, kl_optimum = ((p * np.log(p / base)).sum() for p in (reached, optimum))
    assert kl_reached == pytest.approx(kl_optimum, rel=0.05)
