"""GRPO and its presets, RLOO, REINFORCE and its presets, RAFT: advantages, losses, splits, masks, and the optimum reached."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from experiences import ROWS, WIDTH, experience, mask_of, spoil

from jaxrlhf.algorithms import grpo, offpolicy, policy, raft, reinforce, rloo, shaping, surrogate
from jaxrlhf.core.types import Outputs

ALGORITHMS = {
    "grpo": (grpo, grpo.GRPO),
    "dr_grpo": (grpo, grpo.DR_GRPO),
    "dapo": (grpo, dataclasses.replace(grpo.DAPO, overlong_buffer=3)),
    "gspo": (grpo, grpo.GSPO),
    "grpo_cut": (grpo, dataclasses.replace(grpo.GRPO, drop_cut=True, kl_estimator="k2", clip=policy.Clip(dual=3.0))),
    "rloo": (rloo, rloo.RLOO),
    "rloo_white": (
        rloo,
        rloo.Config(kl_coef=0.3, kl_estimator="k3", whiten_advantages=True, clip=policy.Clip("response", None)),
    ),
    "reinforce": (reinforce, reinforce.REINFORCE),
    "remax": (reinforce, reinforce.REMAX),
    "reinforce_pp": (reinforce, reinforce.REINFORCE_PP),
    "reinforce_pp_baseline": (reinforce, reinforce.REINFORCE_PP_BASELINE),
    "raft": (raft, raft.RAFT),
}
CASES = [pytest.param(*x, id=name) for name, x in ALGORITHMS.items()]
GRADIENT_CASES = [pytest.param(*x, id=name) for name, x in ALGORITHMS.items() if name != "raft"]


def data_for(seed: int, holes: bool = False):
    """Groups of 4: one of them has an empty row, the other one of weight 0."""
    data = experience(seed, holes, samples=4)
    baseline = np.random.default_rng(seed + 50).normal(size=ROWS)
    return data.replace(baseline=jnp.asarray(baseline, jnp.float32))


def counted_of(data) -> np.ndarray:
    return mask_of(data).any(1)


def reference_batch(module, config, data) -> tuple[np.ndarray, np.ndarray]:
    """(mask, advantages) as the papers write them."""
    mask, finished, group = mask_of(data), np.asarray(data.rollout.finished), np.asarray(data.rollout.group)
    counted = mask.any(1)
    score = reference.shaped_score(np.asarray(data.score), finished, config.score)
    if module is grpo:
        if config.overlong_buffer:
            over = np.asarray(data.rollout.response_len) - (WIDTH - config.overlong_buffer)
            score = score - config.overlong_penalty * np.clip(over, 0, config.overlong_buffer) / config.overlong_buffer
        advantage = reference.group_advantages(score, group, counted, config.divide_by_deviation)
        differs = np.array([len({score[j] for j in range(ROWS) if group[j] == g and counted[j]}) > 1 for g in group.tolist()])
        learned = counted & (finished | (not config.drop_cut)) & (differs | (not config.drop_equal_groups))
        return mask & learned[:, None], advantage[:, None] * np.ones(WIDTH)
    logprobs, ref = np.asarray(data.logprobs), np.asarray(data.ref_logprobs)
    kl = reference.kl_estimates(logprobs, ref, mask, config.kl_estimator)
    if module is rloo:
        advantage, learned = reference.leave_one_out(score - config.kl_coef * kl.sum(1), group, counted)
        if config.whiten_advantages:
            advantage = reference.whiten(advantage, learned)
        return mask & learned[:, None], advantage[:, None] * np.ones(WIDTH)
    means = {g: np.mean([score[i] for i in range(ROWS) if group[i] == g and counted[i]]) for g in set(group.tolist())}
    baseline = {
        "none": np.zeros(ROWS),
        "batch": np.full(ROWS, score[counted].mean()),
        "group": np.array([means[g] for g in group.tolist()]),
        "greedy": np.asarray(data.baseline, np.float64),
    }[config.baseline]
    coefficient = config.kl_coef if config.kl_in == "reward" else 0.0
    rewards = reference.token_rewards(score - baseline, kl, mask, coefficient)
    returns = reference.gae(rewards, np.zeros(mask.shape), mask, np.zeros(ROWS), config.gamma, 1.0)[0]
    return mask, reference.whiten(returns, mask) if config.whiten_advantages else returns


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("module", "config"), GRADIENT_CASES)
def test_advantages_equal_the_reference(module, config, holes):
    data = data_for(0, holes)
    batch, state, metrics = module.prepare(data, module.init(config), config)
    mask, advantages = reference_batch(module, config, data)
    assert state == ()
    np.testing.assert_array_equal(batch.mask, mask)
    # The root and the division of a group of 3 or 4 in float32.
    np.testing.assert_allclose(batch.advantages, np.where(mask, advantages, 0), rtol=2e-4, atol=1e-5)
    assert metrics["importance/mean"] == pytest.approx(
        reference.mean(np.exp(np.asarray(data.logprobs - data.rollout.sampled_logprobs, np.float64)), mask), rel=1e-5
    )


def moved(module, config, seed: int, holes: bool = False):
    """A batch, and outputs of a policy that has moved away from it."""
    data = data_for(seed, holes)
    batch, _, _ = module.prepare(data, module.init(config), config)
    noise, entropy = np.random.default_rng(seed + 100).normal(size=(2, ROWS, WIDTH))
    logprobs = data.logprobs + jnp.asarray(0.3 * noise, jnp.float32)
    return batch, Outputs(logprobs=logprobs, entropy=jnp.asarray(entropy, jnp.float32))


def reference_loss(module, config, batch, outputs) -> float:
    mask = np.asarray(batch.mask)
    new, old, ref, advantages = (
        np.asarray(x, np.float64) for x in (outputs.logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages)
    )
    reduction = "sequence" if module is rloo else config.reduction
    low = np.inf if config.clip.low is None else config.clip.low
    high = low if config.clip.high is None else config.clip.high
    losses, kl = np.zeros(mask.shape), np.zeros(mask.shape)
    for row in range(ROWS):
        places = [t for t in range(WIDTH) if mask[row, t]]
        differences = {t: new[row, t] - old[row, t] for t in places}
        for t in places:
            ratio = {
                "token": differences[t],
                "response": sum(differences.values()),
                "response_mean": sum(differences.values()) / len(places),
            }[config.clip.level]
            losses[row, t] = reference.clipped_token(ratio, advantages[row, t], low, high, config.clip.dual)
            kl[row, t] = reference.kl_estimate(new[row, t], ref[row, t], config.kl_estimator)
    in_loss = config.kl_coef if module is grpo or (module is reinforce and config.kl_in == "loss") else 0.0
    return reference.reduced(losses, mask, reduction) + in_loss * reference.reduced(kl, mask, reduction)


def minimised(module, config, outputs, batches, slices=(slice(None),)):
    """What the train step minimises over microbatches: sums and counts added first, then divided."""
    parts = [
        module.loss(jax.tree.map(lambda x, i=i: x[i], outputs), batch, config)[0]
        for i, batch in zip(slices, batches, strict=True)
    ]
    return sum(
        parts[0][name].coefficient * sum(p[name].sum for p in parts) / sum(p[name].count for p in parts) for name in parts[0]
    )


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("module", "config"), GRADIENT_CASES)
def test_loss_equals_the_reference_and_its_gradient_finite_differences(module, config, holes):
    batch, outputs = moved(module, config, 1, holes)
    expected = reference_loss(module, config, batch, outputs)
    assert minimised(module, config, outputs, [batch]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    gradient = jax.grad(lambda x: minimised(module, config, outputs.replace(logprobs=x), [batch]))(outputs.logprobs)
    small, numeric = 1e-5, np.zeros((ROWS, WIDTH))
    base = np.asarray(outputs.logprobs, np.float64)
    for place in np.ndindex(ROWS, WIDTH):
        step = np.zeros((ROWS, WIDTH))
        step[place] = small
        ends = [reference_loss(module, config, batch, outputs.replace(logprobs=base + s * step)) for s in (1, -1)]
        numeric[place] = (ends[0] - ends[1]) / (2 * small)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("module", "config"), CASES)
def test_a_split_adds_up(module, config):
    batch, outputs = moved(module, config, 2, holes=True)
    slices = [slice(0, 1), slice(1, 2), slice(2, 8)]  # the second part holds the empty row alone
    parts = [jax.tree.map(lambda x, i=i: x[i], batch) for i in slices]
    whole = jax.value_and_grad(lambda x: minimised(module, config, x, [batch]))(outputs)
    split = jax.value_and_grad(lambda x: minimised(module, config, x, parts, slices))(outputs)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf])
@pytest.mark.parametrize(("module", "config"), CASES)
def test_masked_places_are_not_read(module, config, garbage):
    data = data_for(3, holes=True)
    clean = module.prepare(data, module.init(config), config)
    dirty = module.prepare(spoil(data.replace(ref_logprobs=-data.ref_logprobs), garbage), module.init(config), config)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)
    batch, outputs = moved(module, config, 3, holes=True)
    soiled = jax.tree.map(lambda x: jnp.where(batch.mask, x, garbage), outputs)
    names = {"old_logprobs", "ref_logprobs", "advantages", "importance"} & {f.name for f in dataclasses.fields(batch)}
    dirty = batch.replace(**{name: jnp.where(batch.mask, getattr(batch, name), -garbage) for name in names})
    both = [
        jax.value_and_grad(lambda x, b=b: minimised(module, config, x, [b]))(x) for x, b in ((outputs, batch), (soiled, dirty))
    ]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("module", "config"), GRADIENT_CASES)
def test_extreme_ratios_give_finite_numbers(module, config):
    batch, outputs = moved(module, config, 4)
    for far in (-1e4, 1e4, 300.0, -300.0):
        value, gradient = jax.value_and_grad(lambda x: minimised(module, config, outputs.replace(logprobs=x), [batch]))(
            batch.old_logprobs + far
        )
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_a_group_of_equal_scores_teaches_nothing():
    data = data_for(5)
    data = data.replace(score=jnp.full(ROWS, 0.1), rollout=data.rollout.replace(finished=jnp.ones(ROWS, bool)))
    for config in (grpo.GRPO, grpo.DR_GRPO):
        batch, _, metrics = grpo.prepare(data, (), config)
        assert not batch.advantages.any()  # 0.1 - mean of 0.1s is rounding, and must not be divided by rounding
        assert metrics["group/differs"] == 0
    dropped, _, metrics = grpo.prepare(data, (), dataclasses.replace(grpo.DAPO, overlong_buffer=0))
    assert not dropped.mask.any()
    assert metrics["group/learned"] == 0
    terms, _ = grpo.loss(Outputs(logprobs=data.logprobs), dropped, grpo.DAPO)
    assert terms["loss/policy"] == (0, 0, 1)


def test_a_response_without_others_leaves_rloo():
    data = data_for(6)
    weight = np.ones(ROWS)
    weight[1:4] = 0  # row 0 is alone
    batch, _, metrics = rloo.prepare(data.replace(weight=jnp.asarray(weight, jnp.float32)), (), rloo.RLOO)
    assert not batch.mask[:4].any()
    assert batch.mask[4:].any(1).all()
    assert metrics["group/learned"] == 0.5


def test_raft_learns_the_best_response_of_each_group():
    data = data_for(7)
    finished = data.rollout.replace(finished=jnp.ones(ROWS, bool))
    score = jnp.asarray([1.0, 9.0, 3.0, 3.0, 8.0, 2.0, 2.0, 1.0])  # row 1 is empty, row 4 has weight 0; 2, 3 and 5, 6 are equal
    batch, _, metrics = raft.prepare(data.replace(rollout=finished, score=score), (), raft.RAFT)
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(batch.mask).any(1)), [2, 5])
    assert metrics["reward/best"] == 2.5
    assert metrics["group/learned"] == 0.25
    outputs = Outputs(logprobs=data.logprobs)
    term = raft.loss(outputs, batch, raft.RAFT)[0]["loss/lm"]
    expected = -reference.mean(np.asarray(data.logprobs), np.asarray(batch.mask))
    assert term.sum / term.count == pytest.approx(expected, rel=1e-6)


def test_a_greedy_baseline_is_in_the_unit_of_the_scores():
    data = data_for(10)
    data = data.replace(baseline=data.score, rollout=data.rollout.replace(finished=jnp.ones(ROWS, bool)))
    config = dataclasses.replace(reinforce.REMAX, kl_coef=0.0, score=shaping.Config(scale=3.0, clip=1.0))
    assert not reinforce.prepare(data, (), config)[0].advantages.any()  # as good as the greedy response: nothing to learn


@pytest.mark.parametrize("missing_eos", ["subtract", "replace"])
def test_what_a_cut_response_scores(missing_eos):
    config = shaping.Config(scale=2.0, clip=3.0, missing_eos=missing_eos, missing_eos_penalty=0.5)
    score = shaping.score(jnp.array([1.0, 1.0, 5.0, 5.0]), jnp.array([True, False, True, False]), config)
    np.testing.assert_allclose(score, [2, -0.5, 3, -0.5] if missing_eos == "replace" else [2, 1.5, 3, 2.5])


def test_overlong_shaping_by_hand():
    lost = shaping.overlong(jnp.array([0, 4, 5, 6, 7, 8]), 8, 4, 2.0)
    np.testing.assert_allclose(lost, [0, 0, 0.5, 1, 1.5, 2])


def test_dual_clip_bounds_a_negative_advantage():
    one = jnp.ones((1, 1), bool)

    def loss(log_ratio, advantage, dual=3.0):
        return surrogate.clipped_policy(log_ratio, jnp.full((1, 1), advantage), one, 0.2, 0.2, dual)[0].sum()

    far = jnp.full((1, 1), jnp.log(10.0))
    assert loss(far, -2.0) == pytest.approx(6.0)  # 3 * 2, not 10 * 2
    assert jax.grad(loss)(far, -2.0)[0, 0] == 0
    assert loss(jnp.full((1, 1), jnp.log(2.0)), -2.0) == pytest.approx(4.0)
    assert loss(far, 2.0) == pytest.approx(-2.4)
    assert loss(far, -2.0, None) == pytest.approx(20.0, rel=1e-6)


@pytest.mark.parametrize("level", ["token", "response"])
@pytest.mark.parametrize("outside", ["truncate", "mask"])
def test_importance_weights_by_hand(level, outside):
    mask = jnp.array([[1, 1, 0], [1, 0, 1]], bool)
    learner, sampler = np.log([[0.5, 0.2, 0.9], [0.3, 0.9, 0.1]]), np.log([[0.25, 0.4, 0.1], [0.1, 0.1, 0.2]])
    config = offpolicy.Config(level, outside, low=0.6, high=1.4)
    weights, metrics = offpolicy.weights(jnp.asarray(learner, jnp.float32), jnp.asarray(sampler, jnp.float32), mask, config)
    raw = np.array([[2, 0.5, 0], [3, 0, 0.5]]) if level == "token" else np.array([[1, 1, 0], [1.5, 0, 1.5]])
    inside = (raw >= 0.6) & (raw <= 1.4)
    expected = np.clip(raw, 0.6, 1.4) if outside == "truncate" else np.where(inside, raw, 0)
    np.testing.assert_allclose(weights, np.where(mask, expected, 0), rtol=1e-5)
    # Reported before any limit.
    assert metrics["importance/max"] == pytest.approx(raw[np.asarray(mask)].max(), rel=1e-5)
    assert metrics["importance/min"] == pytest.approx(raw[np.asarray(mask)].min(), rel=1e-5)
    assert metrics["importance/mean"] == pytest.approx(raw[np.asarray(mask)].mean(), rel=1e-5)
    assert metrics["importance/outside"] == pytest.approx(1 - inside[np.asarray(mask)].mean(), rel=1e-5)


def test_importance_weights_scale_each_tokens_loss_and_carry_no_gradient():
    config = dataclasses.replace(grpo.GRPO, importance=offpolicy.Config(high=1.5), kl_coef=0.0, reduction="token")
    data = data_for(8)

    def total(logprobs):
        batch, _, _ = grpo.prepare(data.replace(logprobs=logprobs), (), config)
        return minimised(grpo, config, Outputs(logprobs=jax.lax.stop_gradient(logprobs)), [batch])

    batch, _, _ = grpo.prepare(data, (), config)
    ratio = np.exp(np.asarray(data.logprobs - data.rollout.sampled_logprobs, np.float64))
    losses = -np.asarray(batch.advantages) * np.minimum(ratio, 1.5)
    assert total(data.logprobs) == pytest.approx(reference.mean(losses, np.asarray(batch.mask)), rel=1e-4)
    assert not jax.grad(lambda x: grpo.prepare(data.replace(logprobs=x), (), config)[0].importance.sum())(data.logprobs).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grpo.Config(samples=1), "samples=1 must be >= 2"),
        (lambda: rloo.Config(samples=1), "samples=1 must be >= 2"),
        (lambda: reinforce.Config(baseline="group"), "samples=1 must be >= 2"),
        (lambda: raft.Config(samples=0), "samples=0 must be >= 2"),
        (lambda: policy.Clip(low=-0.1), "low=-0.1 must be > 0"),
        (lambda: policy.Clip(dual=0.5), "dual=0.5 must be > 1"),
        (lambda: grpo.Config(kl_coef=-1), "kl_coef=-1 must be >= 0"),
        (lambda: grpo.Config(minibatches=0), "minibatches=0 must be >= 1"),
        (lambda: rloo.Config(importance=offpolicy.Config()), "set it to 'response'"),
        (lambda: reinforce.Config(gamma=1.5), r"gamma=1.5 must be in \[0, 1\]"),
        (lambda: offpolicy.Config(low=2.0, high=1.0), "high=1.0 must be above low=2.0"),
        (lambda: grpo.prepare(data_for(9), (), grpo.DAPO), "overlong_buffer=8 is wider than a response of at most 6"),
        (lambda: reinforce.prepare(experience(9), (), reinforce.REMAX), "needs Experience.baseline"),
        (lambda: grpo.loss(Outputs(), moved(grpo, grpo.GRPO, 9)[0], grpo.GRPO), "needs Outputs.logprobs"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def bandit(module, config, beta: float = 0.5, updates: int = 600) -> tuple[float, np.ndarray]:
    """Total variation between the learned policy over 6 answers of one token and the optimum ref * exp(reward / beta)."""
    rng = np.random.default_rng(0)
    ref, reward = jnp.asarray(rng.normal(size=6), jnp.float32), jnp.asarray(rng.normal(size=6), jnp.float32)
    import optax

    from jaxrlhf.core.types import Experience, Rollout

    optimizer = optax.adam(optax.linear_schedule(0.05, 0.0, updates))
    samples, prompts = config.samples if config.samples > 1 else 4, 64
    rows = samples * prompts
    group = jnp.repeat(jnp.arange(prompts), samples)

    def update(carry, key):
        logits, opt_state = carry
        token = jax.random.categorical(key, logits, shape=(rows,))
        logp, ref_logp = jax.nn.log_softmax(logits)[token][:, None], jax.nn.log_softmax(ref)[token][:, None]
        ones = jnp.ones(rows, jnp.int32)
        rollout = Rollout(
            tokens=jnp.stack([0 * token, token], 1),
            prompt_len=ones,
            response_len=ones,
            finished=ones > 0,
            group=group,
            sample=jnp.tile(jnp.arange(samples), prompts),
            version=0 * ones,
            logprobs=logp,
            sampled_logprobs=logp,
        )
        greedy = jnp.full(rows, reward[logits.argmax()])
        zero, one = jnp.zeros(rows), jnp.ones(rows)
        data = Experience(rollout, logp, ref_logp, None, zero, reward[token], one, baseline=greedy)
        batch, _, _ = module.prepare(data, (), config)

        def objective(logits):
            logprobs = jax.nn.log_softmax(logits)[token][:, None]
            terms, _ = module.loss(Outputs(logprobs=logprobs), batch, config)
            return sum(term.coefficient * term.sum / term.count for term in terms.values())

        updates, opt_state = optimizer.update(jax.grad(objective)(logits), opt_state)
        return (optax.apply_updates(logits, updates), opt_state), None

    keys = jax.random.split(jax.random.key(0), updates)
    (logits, _), _ = jax.jit(lambda c: jax.lax.scan(update, c, keys))((ref, optimizer.init(ref)))
    learned = np.asarray(jax.nn.softmax(logits), np.float64)
    optimum = reference.regularised_optimum(np.asarray(jax.nn.softmax(ref)), np.asarray(reward, np.float64), beta)
    return 0.5 * np.abs(learned - optimum).sum(), learned


BANDITS = {
    # The deviation rescales rewards and with them beta, so the optimum is Dr. GRPO's; k2's gradient is the KL's.
    "grpo": (grpo, dataclasses.replace(grpo.DR_GRPO, kl_coef=0.5, kl_estimator="k2")),
    "rloo": (rloo, rloo.Config(kl_coef=0.5)),
    "reinforce": (reinforce, reinforce.Config(kl_coef=0.5)),
    "remax": (reinforce, dataclasses.replace(reinforce.REMAX, kl_coef=0.5)),
    "reinforce_pp": (reinforce, dataclasses.replace(reinforce.REINFORCE_PP, kl_coef=0.5)),
}


@pytest.mark.parametrize("name", BANDITS)
def test_the_bandit_reaches_its_known_optimum(name):
    distance, learned = bandit(*BANDITS[name])
    assert distance < 0.05, learned


def test_without_the_kl_the_bandit_ends_elsewhere():
    distance, _ = bandit(rloo, rloo.Config(kl_coef=0.0))
    assert distance > 0.3
