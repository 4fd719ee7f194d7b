"""Planted mistakes, each of a kind that a code base of this field has shipped, and the tests that must catch it.

`old` stands exactly once in `jaxrlhf/FILE` and is replaced by `new`; then at least one case of every test named must fail.
`tests/test_mutations.py` plants each in a copy of the package and runs its tests there.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutation:
    name: str  # what is wrong
    file: str  # below jaxrlhf/
    old: str
    new: str
    tests: tuple[str, ...]  # below tests/, without parameters


MUTATIONS = (
    # ---------------------------------------------------------------------------------------------------- masks
    Mutation(
        "mask-one-token-too-long",
        "core/masking.py",
        "return jnp.arange(width) < length[..., None]",
        "return jnp.arange(width) <= length[..., None]",
        ("test_masking.py::test_length_mask_by_hand",),
    ),
    Mutation(
        "mask-by-product-lets-nan-through",
        "core/masking.py",
        "return jnp.where(mask, values, 0.0)",
        "return values * mask.astype(values.dtype)",
        ("test_ppo.py::test_masked_places_are_not_read", "test_lm.py::test_masked_places_are_not_read"),
    ),
    Mutation(
        "mean-divides-by-the-padded-width",
        "core/masking.py",
        "jnp.maximum(mask.sum(), 1)",
        "mask.size",
        ("test_masking.py::test_reductions_equal_numpy_and_never_read_masked_places",),
    ),
    Mutation(
        "whitening-uses-the-deviation-of-all-places",
        "core/masking.py",
        "variance = masked_mean(jnp.square(values - mean), mask)",
        "variance = jnp.square(values - mean).mean()",
        ("test_masking.py::test_whiten_equals_numpy",),
    ),
    # ------------------------------------------------------------------------------------------------------- KL
    Mutation(
        "kl-with-the-sign-turned",
        "algorithms/kl.py",
        "masking.masked(logprobs - ref_logprobs, mask)",
        "masking.masked(ref_logprobs - logprobs, mask)",
        ("test_kl.py::test_estimates_equal_the_reference",),
    ),
    Mutation(
        "k2-without-the-half",
        "algorithms/kl.py",
        "return 0.5 * jnp.square(difference)",
        "return jnp.square(difference)",
        ("test_kl.py::test_gradient_of_k2_is_the_gradient_of_the_kl",),
    ),
    Mutation(
        "k3-of-the-inverse-ratio",
        "algorithms/kl.py",
        "return jnp.expm1(-difference) + difference",
        "return jnp.expm1(difference) - difference",
        ("test_kl.py::test_k1_and_k3_are_unbiased",),
    ),
    Mutation(
        "kl-coefficient-falls-when-the-kl-is-too-high",
        "algorithms/kl.py",
        "(1.0 + error * sequences / horizon)",
        "(1.0 - error * sequences / horizon)",
        ("test_kl.py::test_adaptive_coefficient", "test_ppo.py::test_the_coefficient_adapts_only_with_a_target"),
    ),
    # ----------------------------------------------------------------------------------------------- advantages
    Mutation(
        "advantages-decay-across-holes",
        "algorithms/advantages.py",
        "jnp.where(real, advantage, next_advantage)",
        "jnp.where(real, advantage, gamma * lam * next_advantage)",
        ("test_advantages.py::test_holes_are_as_if_their_neighbours_touched",),
    ),
    Mutation(
        "values-of-padding-are-bootstrapped-from",
        "algorithms/advantages.py",
        "carry = jnp.where(real, value, next_value),",
        "carry = value,",
        ("test_advantages.py::test_equals_the_reference",),
    ),
    Mutation(
        "lambda-forgotten",
        "algorithms/advantages.py",
        "gamma * lam * next_advantage",
        "gamma * next_advantage",
        ("test_advantages.py::test_a_row_by_hand",),
    ),
    Mutation(
        "gae-forwards-in-time",
        "algorithms/advantages.py",
        "reverse=True",
        "reverse=False",
        ("test_advantages.py::test_equals_the_reference",),
    ),
    # ------------------------------------------------------------------------------------------------------ PPO
    Mutation(
        "clip-takes-the-lower-loss",
        "algorithms/surrogate.py",
        "masking.masked(jnp.maximum(free, limited), mask)",
        "masking.masked(jnp.minimum(free, limited), mask)",
        ("test_ppo.py::test_which_side_the_ratio_is_clipped_on",),
    ),
    Mutation(
        "clip-limits-swapped",
        "algorithms/surrogate.py",
        "jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)",
        "jnp.clip(ratio, 1.0 - clip_high, 1.0 + clip_low)",
        ("test_ppo.py::test_which_side_the_ratio_is_clipped_on",),
    ),
    Mutation(
        "policy-loss-with-the-sign-turned",
        "algorithms/surrogate.py",
        "free = -advantages * ratio",
        "free = advantages * ratio",
        (
            "test_ppo.py::test_loss_equals_the_reference",
            "test_ppo.py::test_reaches_the_closed_form_optimum_of_the_regularised_bandit",
        ),
    ),
    Mutation(
        "value-clipped-around-the-return",
        "algorithms/surrogate.py",
        "jnp.clip(values, old_values - clip, old_values + clip)",
        "jnp.clip(values, returns - clip, returns + clip)",
        ("test_ppo.py::test_value_clipping",),
    ),
    Mutation(
        "token-mean-counts-padding",
        "algorithms/surrogate.py",
        "mask.sum().astype(jnp.float32), coefficient",
        "jnp.float32(mask.size), coefficient",
        ("test_ppo.py::test_loss_equals_the_reference",),
    ),
    Mutation(
        "score-at-the-last-column",
        "algorithms/ppo.py",
        "last = mask & (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)",
        "last = mask & (jnp.arange(mask.shape[1]) == mask.shape[1] - 1)",
        ("test_ppo.py::test_the_score_stands_at_the_last_real_token",),
    ),
    Mutation(
        "score-at-the-first-token",
        "algorithms/ppo.py",
        "jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]",
        "jnp.cumsum(mask, axis=1)",
        ("test_ppo.py::test_the_score_stands_at_the_last_real_token",),
    ),
    Mutation(
        "penalty-for-ending-instead-of-for-being-cut",
        "algorithms/ppo.py",
        "config.missing_eos_penalty * ~experience.rollout.finished",
        "config.missing_eos_penalty * experience.rollout.finished",
        ("test_ppo.py::test_missing_eos_penalty_and_score_clip",),
    ),
    Mutation(
        "kl-to-the-reference-left-out",
        "algorithms/ppo.py",
        "- kl_coef * token_kl, mask)",
        "- 0.0 * token_kl, mask)",
        (
            "test_ppo.py::test_prepare_equals_the_reference",
            "test_ppo.py::test_reaches_the_closed_form_optimum_of_the_regularised_bandit",
        ),
    ),
    Mutation(
        "returns-of-whitened-advantages",
        "algorithms/ppo.py",
        "        returns=returns,\n",
        "        returns=masking.whiten(advantage, mask) + experience.values,\n",
        ("test_ppo.py::test_prepare_equals_the_reference",),
    ),
    Mutation(
        "excluded-rows-are-learned",
        "algorithms/ppo.py",
        "rollout.written) & counted[:, None]",
        "rollout.written)",
        ("test_ppo.py::test_masked_places_are_not_read",),
    ),
    Mutation(
        "tokens-of-others-are-learned",
        "core/masking.py",
        "return mask if written is None else mask & written",
        "return mask",
        ("test_masking.py::test_response_mask_leaves_out_what_the_policy_did_not_write",),
    ),
    Mutation(
        "entropy-bonus-lowers-entropy",
        "algorithms/ppo.py",
        "mean(-outputs.entropy, config.entropy_coef)",
        "mean(outputs.entropy, config.entropy_coef)",
        ("test_ppo.py::test_entropy_bonus_raises_entropy",),
    ),
    # ------------------------------------------------------------------------------------- language model, reward
    Mutation(
        "packed-texts-predict-across-their-border",
        "algorithms/lm.py",
        "(segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)",
        "segments[:, 1:] > 0",
        ("test_lm.py::test_packed_learns_all_but_first_tokens_and_padding",),
    ),
    Mutation(
        "eos-is-not-learned",
        "algorithms/lm.py",
        "masking.length_mask(response_len, width)",
        "masking.length_mask(response_len - 1, width)",
        ("test_lm.py::test_responses_learn_eos_though_pad_is_eos",),
    ),
    Mutation(
        "the-rejected-is-preferred",
        "algorithms/reward.py",
        "scores[:, :, None] - scores[:, None, :]",
        "scores[:, None, :] - scores[:, :, None]",
        (
            "test_reward.py::test_pair_loss_equals_the_reference",
            "test_reward.py::test_learns_a_separable_set_exactly_and_centres_it",
        ),
    ),
    Mutation(
        "margin-added",
        "algorithms/reward.py",
        "difference - jnp.where(pair, batch.margin, 0.0)",
        "difference + jnp.where(pair, batch.margin, 0.0)",
        ("test_reward.py::test_pair_loss_equals_the_reference",),
    ),
    Mutation(
        "log-of-a-sigmoid-that-underflows",
        "algorithms/pairwise.py",
        "kept = -jax.nn.log_sigmoid(difference)",
        "kept = -jax.numpy.log(jax.nn.sigmoid(difference))",
        ("test_reward.py::test_bradley_terry_is_finite_far_out",),
    ),
    Mutation(
        "equal-scores-count-as-right",
        "algorithms/reward.py",
        "(difference > 0).astype(jnp.float32)",
        "(difference >= 0).astype(jnp.float32)",
        ("test_reward.py::test_metrics",),
    ),
    Mutation(
        "reward-scale-inverted",
        "rewards/model.py",
        '"gain": params["gain"] / deviation',
        '"gain": params["gain"] * deviation',
        ("test_rewards_model.py::test_normalise_sets_mean_and_deviation_and_keeps_the_order",),
    ),
    Mutation(
        "score-read-one-token-past-the-end",
        "models/heads.py",
        "jnp.maximum(length - 1, 0)",
        "length",
        ("test_rewards_model.py::test_the_score_is_read_at_the_real_tokens",),
    ),
)
