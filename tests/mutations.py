"""Planted mistakes, each of a kind that a code base of this field has shipped, and the test that must catch it.

`old` stands exactly once in `jaxrlhf/FILE` and is replaced by `new`; then the test named must fail. `tests/test_mutations.py`
plants each in a copy of the package and runs its test there.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutation:
    name: str  # what is wrong
    file: str  # below jaxrlhf/
    old: str
    new: str
    test: str  # below tests/; with parameters, that one case, else any of them


MUTATIONS = (
    # ---------------------------------------------------------------------------------------------------- masks
    Mutation(
        "mask-one-token-too-long",
        "core/masking.py",
        "return jnp.arange(width) < length[..., None]",
        "return jnp.arange(width) <= length[..., None]",
        "test_masking.py::test_length_mask_by_hand",
    ),
    Mutation(
        "mask-by-product-lets-nan-through",
        "core/masking.py",
        "return jnp.where(mask, values, 0.0)",
        "return values * mask.astype(values.dtype)",
        "test_ppo.py::test_masked_places_are_not_read[nan-True]",
    ),
    Mutation(
        "mean-divides-by-the-padded-width",
        "core/masking.py",
        "jnp.maximum(mask.sum(), 1)",
        "mask.size",
        "test_masking.py::test_reductions_equal_numpy_and_never_read_masked_places",
    ),
    Mutation(
        "whitening-uses-the-deviation-of-all-places",
        "core/masking.py",
        "variance = masked_mean(jnp.square(values - mean), mask)",
        "variance = jnp.square(values - mean).mean()",
        "test_masking.py::test_whiten_equals_numpy",
    ),
    # ------------------------------------------------------------------------------------------------------- KL
    Mutation(
        "kl-with-the-sign-turned",
        "algorithms/kl.py",
        "masking.masked(logprobs - ref_logprobs, mask)",
        "masking.masked(ref_logprobs - logprobs, mask)",
        "test_kl.py::test_estimates_equal_the_reference",
    ),
    Mutation(
        "k2-without-the-half",
        "algorithms/kl.py",
        "return 0.5 * jnp.square(difference)",
        "return jnp.square(difference)",
        "test_kl.py::test_gradient_of_k2_is_the_gradient_of_the_kl",
    ),
    Mutation(
        "k3-of-the-inverse-ratio",
        "algorithms/kl.py",
        "return jnp.expm1(-difference) + difference",
        "return jnp.expm1(difference) - difference",
        "test_kl.py::test_k1_and_k3_are_unbiased",
    ),
    Mutation(
        "kl-coefficient-falls-when-the-kl-is-too-high",
        "algorithms/kl.py",
        "(1.0 + error * sequences / horizon)",
        "(1.0 - error * sequences / horizon)",
        "test_kl.py::test_adaptive_coefficient",
    ),
    # ----------------------------------------------------------------------------------------------- advantages
    Mutation(
        "advantages-decay-across-holes",
        "algorithms/advantages.py",
        "jnp.where(real, advantage, next_advantage)",
        "jnp.where(real, advantage, gamma * lam * next_advantage)",
        "test_advantages.py::test_holes_are_as_if_their_neighbours_touched",
    ),
    Mutation(
        "values-of-padding-are-bootstrapped-from",
        "algorithms/advantages.py",
        "carry = jnp.where(real, value, next_value),",
        "carry = value,",
        "test_advantages.py::test_equals_the_reference[0.9-0.8-True]",
    ),
    Mutation(
        "lambda-forgotten",
        "algorithms/advantages.py",
        "gamma * lam * next_advantage",
        "gamma * next_advantage",
        "test_advantages.py::test_a_row_by_hand",
    ),
    Mutation(
        "gae-forwards-in-time",
        "algorithms/advantages.py",
        "reverse=True",
        "reverse=False",
        "test_advantages.py::test_equals_the_reference[0.9-0.8-True]",
    ),
    # ------------------------------------------------------------------------------------------------------ PPO
    Mutation(
        "clip-takes-the-lower-loss",
        "algorithms/surrogate.py",
        "masking.masked(jnp.maximum(free, limited), mask)",
        "masking.masked(jnp.minimum(free, limited), mask)",
        "test_ppo.py::test_which_side_the_ratio_is_clipped_on",
    ),
    Mutation(
        "clip-limits-swapped",
        "algorithms/surrogate.py",
        "jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)",
        "jnp.clip(ratio, 1.0 - clip_high, 1.0 + clip_low)",
        "test_ppo.py::test_which_side_the_ratio_is_clipped_on",
    ),
    Mutation(
        "policy-loss-with-the-sign-turned",
        "algorithms/surrogate.py",
        "free = -advantages * ratio",
        "free = advantages * ratio",
        "test_ppo.py::test_reaches_the_closed_form_optimum_of_the_regularised_bandit",
    ),
    Mutation(
        "value-clipped-around-the-return",
        "algorithms/surrogate.py",
        "jnp.clip(values, old_values - clip, old_values + clip)",
        "jnp.clip(values, returns - clip, returns + clip)",
        "test_ppo.py::test_value_clipping",
    ),
    Mutation(
        "token-mean-counts-padding",
        "algorithms/surrogate.py",
        "mask.sum().astype(jnp.float32), coefficient",
        "jnp.float32(mask.size), coefficient",
        "test_ppo.py::test_loss_equals_the_reference",
    ),
    Mutation(
        "score-at-the-last-column",
        "algorithms/ppo.py",
        "last = mask & (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)",
        "last = mask & (jnp.arange(mask.shape[1]) == mask.shape[1] - 1)",
        "test_ppo.py::test_the_score_stands_at_the_last_real_token",
    ),
    Mutation(
        "score-at-the-first-token",
        "algorithms/ppo.py",
        "jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]",
        "jnp.cumsum(mask, axis=1)",
        "test_ppo.py::test_the_score_stands_at_the_last_real_token",
    ),
    Mutation(
        "penalty-for-ending-instead-of-for-being-cut",
        "algorithms/ppo.py",
        "config.missing_eos_penalty * ~experience.rollout.finished",
        "config.missing_eos_penalty * experience.rollout.finished",
        "test_ppo.py::test_missing_eos_penalty_and_score_clip",
    ),
    Mutation(
        "kl-to-the-reference-left-out",
        "algorithms/ppo.py",
        "- kl_coef * token_kl, mask)",
        "- 0.0 * token_kl, mask)",
        "test_ppo.py::test_reaches_the_closed_form_optimum_of_the_regularised_bandit",
    ),
    Mutation(
        "returns-of-whitened-advantages",
        "algorithms/ppo.py",
        "        returns=returns,\n",
        "        returns=masking.whiten(advantage, mask) + experience.values,\n",
        "test_ppo.py::test_prepare_equals_the_reference[default-True]",
    ),
    Mutation(
        "excluded-rows-are-learned",
        "algorithms/ppo.py",
        "rollout.written) & counted[:, None]",
        "rollout.written)",
        "test_ppo.py::test_masked_places_are_not_read[nan-True]",
    ),
    Mutation(
        "tokens-of-others-are-learned",
        "core/masking.py",
        "return mask if written is None else mask & written",
        "return mask",
        "test_masking.py::test_response_mask_leaves_out_what_the_policy_did_not_write",
    ),
    Mutation(
        "entropy-bonus-lowers-entropy",
        "algorithms/ppo.py",
        "mean(-outputs.entropy, config.entropy_coef)",
        "mean(outputs.entropy, config.entropy_coef)",
        "test_ppo.py::test_entropy_bonus_raises_entropy",
    ),
    # ------------------------------------------------------------------------------------- language model, reward
    Mutation(
        "packed-texts-predict-across-their-border",
        "algorithms/lm.py",
        "(segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)",
        "segments[:, 1:] > 0",
        "test_lm.py::test_packed_learns_all_but_first_tokens_and_padding",
    ),
    Mutation(
        "eos-is-not-learned",
        "algorithms/lm.py",
        "masking.length_mask(response_len, width)",
        "masking.length_mask(response_len - 1, width)",
        "test_lm.py::test_responses_learn_eos_though_pad_is_eos",
    ),
    Mutation(
        "the-rejected-is-preferred",
        "algorithms/reward.py",
        "scores[:, :, None] - scores[:, None, :]",
        "scores[:, None, :] - scores[:, :, None]",
        "test_reward.py::test_pair_loss_equals_the_reference",
    ),
    Mutation(
        "margin-added",
        "algorithms/reward.py",
        "difference - jnp.where(pair, batch.margin, 0.0)",
        "difference + jnp.where(pair, batch.margin, 0.0)",
        "test_reward.py::test_pair_loss_equals_the_reference",
    ),
    Mutation(
        "log-of-a-sigmoid-that-underflows",
        "algorithms/pairwise.py",
        "kept = -jax.nn.log_sigmoid(difference)",
        "kept = -jax.numpy.log(jax.nn.sigmoid(difference))",
        "test_reward.py::test_bradley_terry_is_finite_far_out",
    ),
    Mutation(
        "equal-scores-count-as-right",
        "algorithms/reward.py",
        "(difference > 0).astype(jnp.float32)",
        "(difference >= 0).astype(jnp.float32)",
        "test_reward.py::test_metrics",
    ),
    Mutation(
        "reward-scale-inverted",
        "rewards/model.py",
        '"gain": params["gain"] / deviation',
        '"gain": params["gain"] * deviation',
        "test_rewards_model.py::test_normalise_sets_mean_and_deviation_and_keeps_the_order",
    ),
    Mutation(
        "score-read-one-token-past-the-end",
        "models/heads.py",
        "jnp.maximum(length - 1, 0)",
        "length",
        "test_rewards_model.py::test_the_score_is_read_at_the_real_tokens",
    ),
    # -------------------------------------------------------------------------------------------- model and heads
    Mutation(
        "logits-read-one-token-late",
        "models/heads.py",
        "jnp.clip(masking.response_index(prompt_len, width) - 1, 0, hidden.shape[1] - 1)",
        "jnp.clip(masking.response_index(prompt_len, width), 0, hidden.shape[1] - 1)",
        "test_heads.py::test_the_state_before_each_response_token",
    ),
    Mutation(
        "temperature-multiplies",
        "models/heads.py",
        "logits = logits / spec.temperature",
        "logits = logits * spec.temperature",
        "test_heads.py::test_policy_logits_by_definition",
    ),
    Mutation(
        "stop-ids-forbidden-one-token-too-long",
        "models/heads.py",
        "position[..., None] < spec.min_tokens",
        "position[..., None] <= spec.min_tokens",
        "test_heads.py::test_policy_logits_by_definition",
    ),
    Mutation(
        "entropy-of-unnormalised-logits",
        "models/heads.py",
        "uncertainty = total - (probability * logits).sum(-1)",
        "uncertainty = -(probability * logits).sum(-1)",
        "test_heads.py::test_logprobs_and_entropy_equal_numpy",
    ),
    Mutation(
        "entropy-gradient-with-the-sign-turned",
        "models/heads.py",
        "slope -= g[1][..., None]",
        "slope += g[1][..., None]",
        "test_heads.py::test_their_gradients_equal_those_of_the_definition",
    ),
    Mutation(
        "attention-looks-ahead",
        "models/attention.py",
        "jnp.tril(jnp.ones((t, t), bool))[None]",
        "jnp.ones((t, t), bool)[None]",
        "test_rollout.py::test_sampler_and_learner_agree_so_that_the_first_ratio_is_one",
    ),
    Mutation(
        "packed-texts-see-each-other",
        "models/attention.py",
        "visible = visible & (segments[:, :, None] == segments[:, None, :])",
        "visible = visible & (segments[:, :, None] > 0)",
        "test_transformer.py::test_packed_texts_do_not_see_each_other[gpt]",
    ),
    Mutation(
        "positions-run-on-across-packed-texts",
        "models/transformer.py",
        "position = segment_positions(segments) if segments is not None else jnp.arange(tokens.shape[1])[None]",
        "position = jnp.arange(tokens.shape[1])[None]",
        "test_transformer.py::test_packed_texts_do_not_see_each_other[gpt]",
    ),
    Mutation(
        "gradient-of-attention-without-its-normaliser",
        "models/attention.py",
        "(jnp.matmul(g, value.swapaxes(-1, -2)) - (g * mixed).sum(-1, keepdims=True))",
        "jnp.matmul(g, value.swapaxes(-1, -2))",
        "test_transformer.py::test_the_gradient_of_attention_is_that_of_its_definition",
    ),
    Mutation(
        "decode-positions-ignore-the-prompt",
        "models/transformer.py",
        'position = jnp.repeat(cache["length"], n) + step',
        'position = jnp.repeat(0 * cache["length"], n) + step',
        "test_rollout.py::test_sampler_and_learner_agree_so_that_the_first_ratio_is_one",
    ),
    Mutation(
        "decode-does-not-see-its-own-token",
        "models/transformer.py",
        "jnp.where(jnp.arange(r) <= step, at_response, MASKED)",
        "jnp.where(jnp.arange(r) < step, at_response, MASKED)",
        "test_rollout.py::test_sampler_and_learner_agree_so_that_the_first_ratio_is_one",
    ),
    Mutation(
        "decode-sees-the-padding-of-the-prompt",
        "models/transformer.py",
        "(jnp.arange(p) < length[:, None])",
        "(jnp.arange(p) <= length[:, None])",
        "test_generate.py::test_what_stands_after_a_prompt_does_not_matter",
    ),
    # ------------------------------------------------------------------------------------------------- sampling
    Mutation(
        "top-p-of-the-improbable",
        "sampling/filters.py",
        "target = p * weight.sum(-1)",
        "target = (1 - p) * weight.sum(-1)",
        "test_filters.py::test_top_p_equals_a_sort_on_a_vocabulary[0.9-usual]",
    ),
    Mutation(
        "the-token-that-crosses-p-is-lost",
        "sampling/filters.py",
        "weight >= jnp.maximum(least, spec.min_p)[:, None]",
        "weight > jnp.maximum(least, spec.min_p)[:, None]",
        "test_filters.py::test_top_p_equals_a_sort_on_a_vocabulary[0.9-usual]",
    ),
    Mutation(
        "top-k-keeps-k-minus-one",
        "sampling/filters.py",
        "return rank >= border[:, None]",
        "return rank > border[:, None]",
        "test_filters.py::test_ties_at_the_border_are_all_kept",
    ),
    Mutation(
        "log-prob-of-the-filtered-distribution-as-the-policys",
        "sampling/generate.py",
        "return token, picked - jax.nn.logsumexp(logits, axis=-1), sampled_logprob",
        "return token, sampled_logprob, sampled_logprob",
        "test_generate.py::test_logprobs_are_those_of_the_policy_and_of_the_distribution_drawn_from[filtered1]",
    ),
    Mutation(
        "eos-does-not-belong-to-the-response",
        "sampling/generate.py",
        "length=state.length + live,",
        "length=state.length + (live & ~stopped),",
        "test_generate.py::test_rows_are_contiguous_and_end_where_they_say",
    ),
    Mutation(
        "samples-of-a-prompt-share-their-random-numbers",
        "sampling/generate.py",
        "jnp.repeat(sample, width), position])",
        "jnp.repeat(0 * sample, width), position])",
        "test_generate.py::test_streams_are_named_by_key_uid_sample_and_position",
    ),
    Mutation(
        "scorer-forgets-the-constraints",
        "sampling/rollout.py",
        "token_logprobs(model, trunk, states, tokens, spec, entropy)",
        "token_logprobs(model, trunk, states, tokens, SamplingSpec(spec.temperature, spec.max_tokens, spec.stop), entropy)",
        "test_rollout.py::test_sampler_and_learner_agree_so_that_the_first_ratio_is_one",
    ),
    Mutation(
        "reference-is-the-policy-itself",
        "sampling/rollout.py",
        "hidden = model.hidden(reference, part.tokens)",
        'hidden = model.hidden(params["policy"], part.tokens)',
        "test_rollout.py::test_learner_and_reference_logprobs_are_those_of_the_policy",
    ),
    Mutation(
        "finished-responses-are-bootstrapped",
        "sampling/rollout.py",
        "jnp.where(part.finished, 0.0, heads.values(head, last))",
        "heads.values(head, last)",
        "test_rollout.py::test_values_stand_before_each_token_and_bootstrap_after_a_cut_response",
    ),
    # ------------------------------------------------------------------------------------------------- training
    Mutation(
        "packed-rows-predict-the-token-just-read",
        "training/objective.py",
        "return batch.tokens[:, 1:], hidden[:, :-1]",
        "return batch.tokens[:, 1:], hidden[:, 1:]",
        "test_objective.py::test_packed_rows_need_no_gather_and_give_the_same",
    ),
    Mutation(
        "each-microbatch-divides-by-its-own-count",
        "training/step.py",
        "total = _total({name: term._replace(count=counts[name]) for",
        "total = _total({name: term for",
        "test_step.py::test_loss_and_gradient_do_not_depend_on_the_split",
    ),
    Mutation(
        "coefficients-of-terms-forgotten",
        "training/step.py",
        "return jnp.stack([term.coefficient * _mean(term) for",
        "return jnp.stack([_mean(term) for",
        "test_step.py::test_it_minimises_coefficient_times_sum_over_count",
    ),
    Mutation(
        "an-update-that-is-not-finite-is-taken",
        "training/step.py",
        "finite = jnp.isfinite(norm) & jnp.isfinite(_total(seen[0]))",
        "finite = jnp.isfinite(norm) | True",
        "test_step.py::test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted[1]",
    ),
    Mutation(
        "learning-rate-rises-after-the-warm-up",
        "training/optimizer.py",
        "0.5 * (1.0 + jnp.cos(jnp.pi * done))",
        "0.5 * (1.0 - jnp.cos(jnp.pi * done))",
        "test_optimizer.py::test_schedule",
    ),
    # ----------------------------------------------------------------------------------------------- evaluation
    Mutation(
        "a-tie-is-a-win",
        "evaluation/win_rate.py",
        "0.5 * (candidate == baseline)",
        "1.0 * (candidate == baseline)",
        "test_win_rate.py::test_ties_count_half",
    ),
    Mutation(
        "interval-of-a-quarter-of-the-trials",
        "evaluation/win_rate.py",
        "z2 / (4 * n)",
        "z2 / n",
        "test_win_rate.py::test_wilson_published_figures",
    ),
)
