"""Value functions on the policy's trunk or with one of their own; exact KL; the pre-training mix; sets of responses."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from jaxrlhf.algorithms import lm, ppo
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.models import roles, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.sampling import rollout
from jaxrlhf.training import objective, step

VOCAB, WIDTH = 30, 16
MODEL = transformer.build(
    TransformerConfig(
        vocab_size=VOCAB, width=WIDTH, layers=1, heads=2, kv_heads=2, head_width=8, mlp_width=24, max_length=16, tied_head=False
    )
)
SPEC = SamplingSpec(temperature=0.7, max_tokens=6, stop=(2,), min_tokens=2, forbidden=(0, 1))


def language_model(seed: int):
    fresh = MODEL.init(jax.random.key(seed))
    return fresh | {"head": fresh["head"] * 20}


def head(seed: int):
    weight = jax.random.normal(jax.random.key(seed), (WIDTH,))
    return {"weight": weight, "bias": jnp.float32(0.3)}


OPTIONS = rollout.Options()


def collect(params, options=OPTIONS, count: int = 8):
    rng = np.random.default_rng(0)
    tokens, length, uid = rng.integers(3, VOCAB, (count, 5)), rng.integers(1, 6, count), np.arange(count)
    given = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), Prompts(tokens=tokens, length=length, uid=uid, row=uid))
    return rollout.collect(MODEL, params, {"reference": language_model(1)}, given, SPEC, jax.random.key(2), options=options)


def by_hand(trunk, head, data) -> np.ndarray:
    hidden = np.asarray(MODEL.hidden(trunk, data.rollout.tokens), np.float64)
    value = hidden @ np.asarray(head["weight"], np.float64) + float(head["bias"])
    out = np.zeros(data.logprobs.shape)
    for b, start in enumerate(data.rollout.prompt_len.tolist()):
        for t in range(int(data.rollout.response_len[b])):
            out[b, t] = value[b, start - 1 + t]
    return out


def test_a_critic_with_its_own_trunk_gives_the_values():
    params = {"policy": language_model(0), "critic": {"trunk": language_model(5), "head": head(6)}}
    data = collect(params)
    np.testing.assert_allclose(data.values, by_hand(language_model(5), head(6), data), atol=3e-5)
    batch, _, _ = ppo.prepare(data, ppo.init(ppo.Config()), ppo.Config())
    outputs = objective.make_outputs(MODEL, SPEC, values=True, trunk="policy")(params, None, batch, None)
    np.testing.assert_allclose(np.where(batch.mask, outputs.values, 0), data.values, atol=3e-5)


def gradients(params):
    data = collect(params)
    batch, _, _ = ppo.prepare(data, ppo.init(ppo.Config()), ppo.Config())
    outputs = objective.make_outputs(MODEL, SPEC, values=True, trunk="policy")

    def value_loss(params):
        term = ppo.loss(outputs(params, None, batch, None), batch, ppo.Config())[0]["loss/value"]
        return term.sum / term.count

    return jax.grad(value_loss)(params)


def test_only_a_shared_trunk_learns_from_the_value_loss():
    apart = gradients({"policy": language_model(0), "critic": {"trunk": language_model(5), "head": head(6)}})
    assert float(optax.tree.norm(apart["policy"])) == 0
    assert float(optax.tree.norm(apart["critic"]["trunk"])) > 0
    shared = gradients({"policy": language_model(0), "value": head(6)})
    assert float(optax.tree.norm(shared["policy"])) > 0


def test_a_critic_that_starts_as_the_reward_model_foresees_its_score():
    reward = {"trunk": language_model(5), "head": head(6), "gain": jnp.float32(2.0), "bias": jnp.float32(-0.5)}
    critic = roles.critic_from_reward(reward)
    params = {"policy": language_model(0), "critic": critic}
    data = collect(params)
    np.testing.assert_allclose(
        data.values, np.where(data.values != 0, 2 * by_hand(reward["trunk"], head(6), data) - 0.5, 0), atol=1e-4
    )
    fresh = roles.critic(language_model(0), WIDTH)
    assert not collect(params | {"critic": fresh}).values.any()


def test_no_value_function_is_an_error_where_values_are_asked_for():
    assert collect({"policy": language_model(0)}).values is None
    with pytest.raises(ValueError, match=r"params\['value'\]"):
        roles.value_states(MODEL, {"policy": language_model(0)}, jnp.ones((1, 4), jnp.int32), None)


def whole_kl(p_tree, q_tree, data) -> np.ndarray:
    out = np.zeros(data.logprobs.shape)
    logits = [np.asarray(MODEL.logits(t, MODEL.hidden(t, data.rollout.tokens)), np.float64) / 0.7 for t in (p_tree, q_tree)]
    for b, start in enumerate(data.rollout.prompt_len.tolist()):
        for t in range(int(data.rollout.response_len[b])):
            allowed = [v for v in range(VOCAB) if v not in (0, 1) and not (v == 2 and t < 2)]
            p, q = (reference.log_softmax(x[b, start - 1 + t][allowed]) for x in logits)
            out[b, t] = (np.exp(p) * (p - q)).sum()
    return out


def test_exact_kl_is_that_of_the_whole_distribution_in_rollout_and_objective():
    params = {"policy": language_model(0), "value": head(6)}
    data = collect(params, rollout.Options(exact_kl=True))
    expected = whole_kl(language_model(0), language_model(1), data)
    np.testing.assert_allclose(data.ref_kl, expected, rtol=1e-3, atol=2e-4)  # float32 sums over the vocabulary
    assert expected.max() > 0.1
    config = ppo.Config(kl_in="loss", kl_estimator="exact", kl_coef=0.5)
    batch, _, _ = ppo.prepare(data, ppo.init(config), config)
    outputs = objective.make_outputs(MODEL, SPEC, values=True, ref_kl=True, trunk="policy")
    found = outputs(params, {"reference": language_model(1)}, batch, None)
    np.testing.assert_allclose(np.where(batch.mask, found.ref_kl, 0), expected, rtol=1e-3, atol=2e-4)
    term = ppo.loss(found, batch, config)[0]["loss/kl"]
    assert term.sum / term.count == pytest.approx(0.5 * expected.sum() / (expected != 0).sum(), rel=1e-3)

    def total(policy):
        changed = outputs(params | {"policy": policy}, {"reference": language_model(1)}, batch, None)
        return ppo.loss(changed, batch, config)[0]["loss/kl"].sum

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.grad(total)(params["policy"])))


def test_exact_kl_that_was_not_asked_for_is_an_error():
    config = ppo.Config(kl_estimator="exact")
    with pytest.raises(ValueError, match="exact_kl"):
        ppo.prepare(collect({"policy": language_model(0), "value": head(6)}), ppo.init(config), config)


def test_the_pretraining_mix_adds_the_loss_of_its_own_rows_at_temperature_1():
    params = {"policy": language_model(0), "value": head(6)}
    config = ppo.Config(text_coef=2.0)
    batch, _, _ = ppo.prepare(collect(params), ppo.init(config), config)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (8, 12))
    segments = np.tile([1] * 5 + [2] * 4 + [0] * 3, (8, 1))
    batch = batch.replace(text=lm.packed(tokens, segments))
    outputs = objective.make_outputs(MODEL, SPEC, values=True, text=True, trunk="policy")
    term = ppo.loss(outputs(params, None, batch, None), batch, config)[0]["loss/text"]
    alone = objective.make_outputs(MODEL, packed=True)(params["policy"], None, batch.text, None)
    expected = lm.loss(alone, batch.text, lm.Config())[0]["loss/lm"]
    assert (term.coefficient, term.count) == (2.0, expected.count)
    assert term.sum == pytest.approx(float(expected.sum), rel=1e-6)
    with pytest.raises(ValueError, match=r"text_coef=2\.0 needs Outputs\.text_logprobs"):
        ppo.loss(objective.make_outputs(MODEL, SPEC, values=True, trunk="policy")(params, None, batch, None), batch, config)


def test_while_the_critic_warms_up_the_policy_stays():
    params = {"policy": language_model(0), "critic": {"trunk": language_model(5), "head": head(6)}}
    config = ppo.Config(critic_warmup=1, entropy_coef=0.1, kl_in="loss", kl_estimator="k2")
    outputs = objective.make_outputs(MODEL, SPEC, values=True, entropy=True, trunk="policy")
    optimizer = optax.sgd(0.1)
    run = step.make_epochs(outputs, ppo.loss, config, optimizer, 1, 2)
    state = step.init_state(params, optimizer, jax.random.key(0), ppo.init(config))
    moves = []
    for _ in range(2):
        data = collect(state.params)
        data = dataclasses.replace(data, score=jnp.arange(8.0))
        batch, algorithm, _ = ppo.prepare(data, state.algorithm, config)
        before = jax.tree.map(np.asarray, state.params)
        state, _ = run(dataclasses.replace(state, algorithm=algorithm), None, batch)
        moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), state.params, before)
        moves.append((max(jax.tree.leaves(moved["policy"])), max(jax.tree.leaves(moved["critic"]))))
    assert moves[0][0] == 0
    assert moves[0][1] > 0
    assert moves[1][0] > 0


def test_sets_of_responses_are_scored_as_their_rows_alone():
    tree = language_model(0)
    rng = np.random.default_rng(3)
    tokens, prompt_len = rng.integers(3, VOCAB, (3, 2, 11)), rng.integers(1, 5, (3, 2))
    response_len = rng.integers(1, 6, (3, 2))
    mask = np.arange(6) < response_len[..., None]

    @dataclasses.dataclass
    class Sets:
        tokens: object
        prompt_len: object
        response_len: object
        mask: object

    outputs = objective.make_outputs(MODEL, entropy=True)
    sets = outputs(tree, None, Sets(*map(jnp.asarray, (tokens, prompt_len, response_len, mask))), None)
    assert sets.logprobs.shape == sets.entropy.shape == (3, 2, 6)
    for i in range(3):
        for j in range(2):
            one = Sets(*(jnp.asarray(x[i, j : j + 1]) for x in (tokens, prompt_len, response_len, mask)))
            np.testing.assert_allclose(sets.logprobs[i, j], outputs(tree, None, one, None).logprobs[0], atol=2e-5)


def test_the_average_of_parameters_follows_by_its_decay():
    params = {"w": jnp.array([1.0, 2.0])}
    state = step.init_state(params, optax.sgd(1.0), jax.random.key(0))
    state = step.update_ema(state, 0.9)
    np.testing.assert_array_equal(state.ema["w"], [1, 2])
    state = step.update_ema(dataclasses.replace(state, params={"w": jnp.array([3.0, -2.0])}), 0.9)
    np.testing.assert_allclose(state.ema["w"], [1.2, 1.6], rtol=1e-6)
    with pytest.raises(ValueError, match="decay=1"):
        step.update_ema(state, 1)
