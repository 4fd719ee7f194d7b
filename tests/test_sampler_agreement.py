"""Before the first update, for many ways to sample: what the sampler wrote down is what the learner computes.

The one test that finds most mistakes of this field: a forgotten temperature, a shift by one, filtered log-probs taken for
plain ones, another attention pattern with the cache. Full tier: more specs, more prompts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import ppo
from jaxrlhf.core import masking
from jaxrlhf.core.types import Experience, Prompts, SamplingSpec
from jaxrlhf.models import heads, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.sampling import rollout
from jaxrlhf.training import objective

VOCAB, ROWS = 67, 24  # not a multiple of 32: the last word of a kept set is not full
MODEL = transformer.build(
    TransformerConfig(
        vocab_size=VOCAB, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=48, max_length=24, tied_head=False
    )
)
BASE = SamplingSpec(temperature=1.0, max_tokens=10, stop=(2, 3), min_tokens=2, forbidden=(0, 1), replay=True)
SPECS = {
    "plain": {},
    "t0.3": {"temperature": 0.3},
    "t0.7": {"temperature": 0.7},
    "t1.5": {"temperature": 1.5},
    "k1": {"top_k": 1},
    "k5": {"top_k": 5},
    "k20-t0.7": {"top_k": 20, "temperature": 0.7},
    "p0.5": {"top_p": 0.5},
    "p0.9": {"top_p": 0.9},
    "p0.9-t0.7": {"top_p": 0.9, "temperature": 0.7},
    "p0.95-t1.5": {"top_p": 0.95, "temperature": 1.5},
    "m0.1": {"min_p": 0.1},
    "m0.05-t1.3": {"min_p": 0.05, "temperature": 1.3},
    "all": {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
}


def language_model(seed: int):
    fresh = MODEL.init(jax.random.key(seed))
    return fresh | {"head": fresh["head"] * 20}  # clear preferences, as of a trained model


def prompts(count: int) -> Prompts:
    rng = np.random.default_rng(0)
    tokens, length, uid = rng.integers(5, VOCAB, (count, 7)), rng.integers(1, 8, count), np.arange(count)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), Prompts(tokens=tokens, length=length, uid=uid, row=uid))


# Each spec compiles its own sampler and scorer.
FIRST = ("plain", "t0.7", "k5", "p0.9-t0.7", "m0.05-t1.3", "all")


@pytest.fixture(
    scope="module", params=[name if name in FIRST else pytest.param(name, marks=pytest.mark.full) for name in SPECS]
)
def case(request) -> tuple[SamplingSpec, dict, Experience, Experience]:
    """The spec, parameters, and the same rollout scored with its kept sets replayed and without."""
    spec = dataclasses.replace(BASE, **SPECS[request.param])
    zeros = {"weight": jnp.zeros(MODEL.width), "bias": jnp.zeros([])}
    params, frozen = {"policy": language_model(0), "value": zeros}, {"reference": language_model(1)}
    with jax.default_matmul_precision("highest"):
        replayed = rollout.collect(MODEL, params, frozen, prompts(ROWS), spec, jax.random.key(3), n=2)
        drawn = dataclasses.replace(replayed.rollout, kept=None)
        plain = rollout.experience(MODEL, params, frozen, drawn, dataclasses.replace(spec, replay=False))
    return spec, params, replayed, plain


def mask_of(experience: Experience) -> np.ndarray:
    return np.asarray(masking.length_mask(experience.rollout.response_len, BASE.max_tokens))


def test_learner_and_sampler_agree_on_the_full_softmax(case):
    _, _, replayed, plain = case
    gap = np.abs(np.asarray(plain.logprobs - plain.rollout.logprobs))[mask_of(plain)]
    assert gap.size > ROWS * 2
    assert gap.max() < 1e-4  # float32: logits of size 6 summed over 67 tokens
    np.testing.assert_array_equal(plain.ref_logprobs, replayed.ref_logprobs)  # the reference is never renormalised


def test_replayed_over_the_kept_set_the_learner_has_the_distribution_drawn_from(case):
    spec, _, replayed, plain = case
    gap = np.abs(np.asarray(replayed.logprobs - replayed.rollout.sampled_logprobs))[mask_of(replayed)]
    assert gap.max() < 1e-4
    assert float(rollout.stats(replayed)["rollout/sampler_gap_max"]) < 1e-4
    if spec.filtered:
        assert replayed.rollout.kept is not None
        between = np.asarray(plain.logprobs - replayed.logprobs)[mask_of(plain)]
        assert between.max() < 1e-5  # renormalising only adds probability
        assert between.min() < -0.05  # and does so: the test would not see a filter that is off
    else:
        assert replayed.rollout.kept is None


def test_importance_weights_sum_to_the_kept_mass(case):
    """E over the kept set of policy / sampled = sum over it of the policy: 1 without filters, else the mass that was kept."""
    spec, params, replayed, plain = case
    drawn = plain.rollout
    index = jnp.clip(masking.response_index(drawn.prompt_len, BASE.max_tokens), 0, drawn.tokens.shape[1] - 1)
    states = jnp.take_along_axis(MODEL.hidden(params["policy"], drawn.tokens), index[..., None] - 1, axis=1)
    logits = MODEL.logits(params["policy"], states)
    position = jnp.broadcast_to(jnp.arange(BASE.max_tokens), logits.shape[:2])
    logits = heads.policy_logits(logits, position, spec)
    probability = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    kept = np.ones_like(probability, bool)
    if spec.filtered:
        kept = np.asarray(masking.unpack_bits(replayed.rollout.kept, VOCAB))
    mask = mask_of(plain)
    mass = (probability * kept).sum(-1)[mask]
    weight = np.exp(np.asarray(plain.logprobs - drawn.sampled_logprobs, np.float64))[mask]
    error = weight.std() / np.sqrt(weight.size) + 1e-6
    assert abs(weight.mean() - mass.mean()) < 3 * error + 1e-4


def first_loss(case) -> dict[str, float]:
    """Metrics of PPO's loss on the whole rollout with the parameters that sampled it."""
    spec, params, replayed, _ = case
    batch, _, _ = ppo.prepare(replayed, ppo.init(ppo.Config()), ppo.Config())
    outputs = objective.make_outputs(MODEL, spec, values=True, trunk="policy")
    with jax.default_matmul_precision("highest"):
        _, metrics = jax.jit(lambda p, b: ppo.loss(outputs(p, None, b, None), b, ppo.Config()))(params, batch)
    return {name: float(term.sum / term.count) for name, term in metrics.items()}


def test_the_first_ratio_is_one_and_nothing_is_clipped(case):
    metrics = first_loss(case)
    assert metrics["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["policy/approx_kl"] < 1e-9


def test_without_replay_a_filtered_sampler_is_off_policy_and_says_so():
    spec = dataclasses.replace(BASE, top_p=0.8, replay=False)
    params = {"policy": language_model(0), "value": {"weight": jnp.zeros(MODEL.width), "bias": jnp.zeros([])}}
    plain = rollout.collect(MODEL, params, {"reference": language_model(1)}, prompts(ROWS), spec, jax.random.key(3))
    _, _, metrics = ppo.prepare(plain, ppo.init(ppo.Config()), ppo.Config())
    assert metrics["importance/mean"] < 0.95  # the mass that top-p keeps
    assert float(metrics["policy/kl_ref"]) > 0


def test_kept_sets_are_packed_and_unpacked():
    kept = np.random.default_rng(0).random((3, 5, VOCAB)) < 0.3
    words = masking.pack_bits(jnp.asarray(kept))
    assert words.shape == (3, 5, 3)
    assert words.dtype == jnp.uint32
    np.testing.assert_array_equal(masking.unpack_bits(words, VOCAB), kept)
    assert int(words[0, 0, 0]) == sum(1 << i for i in range(32) if kept[0, 0, i])


def test_replay_needs_the_kept_sets():
    spec = dataclasses.replace(BASE, top_p=0.8)
    params = {"policy": language_model(0), "value": {"weight": jnp.zeros(MODEL.width), "bias": jnp.zeros([])}}
    data = rollout.collect(MODEL, params, {"reference": language_model(1)}, prompts(8), spec, jax.random.key(0))
    batch, _, _ = ppo.prepare(data, ppo.init(ppo.Config()), ppo.Config())
    outputs = objective.make_outputs(MODEL, spec, values=True, trunk="policy")
    with pytest.raises(ValueError, match="no kept sets"):
        outputs(params, None, batch.replace(kept=None), None)
    with pytest.raises(ValueError, match="no draw"):
        dataclasses.replace(spec, greedy=True)
