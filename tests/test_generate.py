"""What a rollout holds, that it says the truth about itself, and that it depends on nothing it should not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_cases import BOS, CONFIG, EOS, KEY, MODEL, PAD, VOCAB, assert_same, prompts, responses, spec, take, weights

from jaxrlhf.core import sharding
from jaxrlhf.core.types import Rollout, SamplingSpec
from jaxrlhf.models import flax_adapter, transformer
from jaxrlhf.models.heads import IMPOSSIBLE
from jaxrlhf.models.model import CacheConfig
from jaxrlhf.sampling import checks, decode, filters, generate
from jaxrlhf.sampling.generate import Options
from jaxrlhf.sampling.rows import Shape, uniforms


@pytest.fixture(scope="module")
def params():
    return weights()


@pytest.fixture(scope="module")
def sampled(params) -> Rollout:
    """Two responses to each of eight prompts: what the tests below are compared with."""
    return generate.generate(MODEL, params, prompts(), spec(), KEY, n=2)


def teacher_forced(params, rollout: Rollout, spec: SamplingSpec) -> np.ndarray:
    """Float64 policy logits [B, R, V] at each response token of the rows as they stand, by a loop over rows and places."""
    logits = np.asarray(MODEL.logits(params, MODEL.hidden(params, rollout.tokens)), np.float64)
    out = np.full((*rollout.logprobs.shape, VOCAB), -1e9)
    for b, (start, length) in enumerate(zip(rollout.prompt_len.tolist(), rollout.response_len.tolist(), strict=True)):
        for t in range(length):
            row = logits[b, start + t - 1]
            seen = np.isin(np.arange(VOCAB), rollout.tokens[b, : start + t])
            penalty = spec.repetition_penalty
            out[b, t] = np.where(seen, np.where(row > 0, row / penalty, row * penalty), row) / spec.temperature
            out[b, t, list(spec.forbidden)] = -1e9
            if t < spec.min_tokens:
                out[b, t, list(spec.stop)] = -1e9
    return out


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# ------------------------------------------------------------------------------------------------ rows


def test_rows_are_contiguous_and_end_where_they_say(params):
    given, rules = prompts(), spec(min_tokens=2, forbidden=(PAD, BOS))
    rollout = generate.generate(MODEL, params, given, rules, KEY, n=4, version=9)
    assert rollout.tokens.shape == (32, 16)
    assert rollout.logprobs.shape == rollout.sampled_logprobs.shape == (32, 10)
    ends = set()
    for i, response in enumerate(responses(rollout)):
        start, length = int(given.length[i // 4]), len(response)
        row = rollout.tokens[i].tolist()
        assert row[:start] == given.tokens[i // 4, :start].tolist()
        assert row[start + length :] == [PAD] * (16 - start - length)
        assert not {PAD, BOS} & set(response)
        assert not any(token in rules.stop for token in response[:-1])
        assert bool(rollout.finished[i]) == (response[-1] in rules.stop)
        assert bool(rollout.finished[i]) or length == rules.max_tokens
        assert length > rules.min_tokens
        for logprobs in (rollout.logprobs, rollout.sampled_logprobs):
            assert (np.asarray(logprobs[i, :length]) < 0).all()
            assert (np.asarray(logprobs[i, length:]) == 0).all()
        ends.add((bool(rollout.finished[i]), length))
    assert {finished for finished, _ in ends} == {True, False}  # both kinds were seen
    assert (True, 3) in ends  # the first place at which a stop id may stand: it counts, and it is token number 3
    assert rollout.group.tolist() == np.repeat(given.uid, 4).tolist()
    assert rollout.sample.tolist() == [0, 1, 2, 3] * 8
    assert rollout.version.tolist() == [9] * 32
    assert rollout.kept is None
    assert rollout.written is None


def test_a_stop_id_as_the_last_token_finishes_and_a_cut_response_does_not(params):
    given = prompts(2)
    never = generate.generate(MODEL, params, given, spec(max_tokens=3, stop=()), KEY)
    assert never.response_len.tolist() == [3, 3]
    assert not never.finished.any()
    written = responses(never)
    last = generate.generate(MODEL, params, given, spec(max_tokens=3, min_tokens=2, stop=(written[0][2],)), KEY)
    # The constraint on the first two tokens may move those draws: pin it only where it did not.
    assert responses(last)[0] == written[0]
    assert last.response_len.tolist()[0] == 3
    assert bool(last.finished[0])


def test_pad_may_equal_eos(params, sampled):
    same = generate.generate(MODEL, params, prompts(), spec(pad=EOS), KEY, n=2)
    assert responses(same) == responses(sampled)
    np.testing.assert_array_equal(same.finished, sampled.finished)


def test_what_stands_after_a_prompt_does_not_matter(params, sampled):
    given = prompts()
    cleared = given.replace(tokens=jnp.where(jnp.arange(6) < given.length[:, None], given.tokens, 10**8))
    assert_same(generate.generate(MODEL, params, cleared, spec(), KEY, n=2), sampled)


# ------------------------------------------------------------------------------------------------ log-probs


@pytest.mark.parametrize(
    "filtered",
    [{}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.9, "min_p": 0.1}, {"greedy": True}, {"repetition_penalty": 1.6, "top_p": 0.8}],
)
def test_logprobs_are_those_of_the_policy_and_of_the_distribution_drawn_from(params, filtered):
    with jax.default_matmul_precision("highest"):
        rules = spec(min_tokens=3, forbidden=(PAD, BOS, 9), **filtered)
        rollout = generate.generate(MODEL, params, prompts(), rules, KEY, n=2)
        logits = teacher_forced(params, rollout, rules)
    policy = log_softmax(logits)
    allowed = np.asarray(filters.apply(jnp.float32(logits.reshape(-1, VOCAB)), rules)) > IMPOSSIBLE
    drawn = log_softmax(np.where(allowed.reshape(logits.shape), logits, -1e9))  # filters.apply: see test_filters.py
    for i, response in enumerate(responses(rollout)):
        for t, token in enumerate(response):
            # 5e-5: float32 sums in another order, and logits of size 6.
            np.testing.assert_allclose(rollout.logprobs[i, t], policy[i, t, token], atol=5e-5)
            want = 0.0 if rules.greedy else drawn[i, t, token]
            np.testing.assert_allclose(rollout.sampled_logprobs[i, t], want, atol=5e-5)
            if rules.greedy:
                assert token == logits[i, t].argmax()
    gap = float(jnp.abs(rollout.logprobs - rollout.sampled_logprobs).max())
    assert gap > 0.05 if filtered else gap == 0
    if rules.penalised:
        free = generate.generate(MODEL, params, prompts(), dataclasses.replace(rules, repetition_penalty=1.0), KEY, n=2)
        assert repeated(rollout) < 0.7 * repeated(free)


def repeated(rollout: Rollout) -> float:
    """Tokens that stand in their response already, a response."""
    return float(np.mean([len(response) - len(set(response)) for response in responses(rollout)]))


def test_first_tokens_follow_the_policy(params):
    """6,000 draws of one prompt against its exact distribution; a chi-square of a fixed draw, far inside its 99.9 % bound."""
    one, rules = take(prompts(), [2]), spec(max_tokens=1, forbidden=(PAD, BOS))
    rollout = generate.generate(MODEL, params, one, rules, KEY, n=6000)
    expected = 6000 * np.exp(log_softmax(teacher_forced(params, rollout, rules)[0, 0]))
    counts = np.bincount([response[0] for response in responses(rollout)], minlength=VOCAB)
    likely = expected > 5
    assert likely.sum() > 8
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi_square < likely.sum() + 3.1 * np.sqrt(2 * likely.sum())
    assert counts[[PAD, BOS]].sum() == 0


# ------------------------------------------------------------------------------------------------ independence


def test_output_does_not_depend_on_order_or_batch(params, sampled):
    given, order = prompts(), [5, 2, 7, 0, 1, 3, 6, 4]
    shuffled = generate.generate(MODEL, params, take(given, order), spec(), KEY, n=2)
    assert_same(shuffled, take(sampled, [2 * i + j for i in order for j in (0, 1)]))
    assert_same(generate.generate(MODEL, params, take(given, [6]), spec(), KEY, n=2), take(sampled, [12, 13]))
    wider = given.replace(tokens=jnp.pad(given.tokens, ((0, 0), (0, 5))))
    assert responses(generate.generate(MODEL, params, wider, spec(), KEY, n=2)) == responses(sampled)


def test_output_does_not_depend_on_n_or_chunk(params, sampled):
    given = prompts()
    assert_same(generate.generate(MODEL, params, given, spec(), KEY, n=1), take(sampled, list(range(0, 16, 2))))
    for chunk in (4, 100):  # 4: three chunks of 4 steps, two of them past the end
        assert_same(generate.generate(MODEL, params, given, spec(), KEY, n=2, options=Options(chunk)), sampled)


LIMITS = (18, 2, 3, 18, 1, 5, 2, 9)  # of eight prompts


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (None, [32, 16, 16, 8, 8, 8]),  # rows that go on after each chunk of 3: 16, 12, 8, 8, 8
        pytest.param(sharding.MeshConfig(data=2, fsdp=2, tensor=2), [32, 16, 16, 8, 8, 8], marks=pytest.mark.full),
        # 8 rows on 8 devices are the fewest.
        pytest.param(sharding.MeshConfig(), [32, 16, 16, 8, 8, 8], marks=pytest.mark.full),
    ],
    ids=["one", "2x2x2", "data=8"],
)
def test_rows_that_have_ended_leave_and_change_nothing(params, shape, expected):
    given = prompts().replace(limit=jnp.asarray(LIMITS, jnp.int32))
    rules = spec(max_tokens=18, stop=(), top_p=0.9, replay=True)  # without a stop id the limits decide
    options = Options(chunk=3)
    static, chunks = generate.traced(MODEL, params, given, rules, KEY, n=4, options=dataclasses.replace(options, least=32))
    assert chunks == [(32, 3)] * 6
    assert static.response_len.tolist() == np.repeat(LIMITS, 4).tolist()
    assert not static.finished.any()
    if shape is None:
        compacted, chunks = generate.traced(MODEL, params, given, rules, KEY, n=4, options=options)
    else:
        mesh = sharding.make_mesh(shape)
        placed = jax.device_put(params, sharding.shardings(transformer.param_specs(CONFIG), mesh))
        with jax.set_mesh(mesh):
            split = sharding.shard_batch(given, mesh)
            compacted, chunks = generate.traced(MODEL, placed, split, rules, KEY, n=4, options=options)
        for leaf in jax.tree.leaves(compacted):
            assert leaf.sharding.is_equivalent_to(sharding.batch_sharding(mesh), leaf.ndim)
    assert [rows for rows, _ in chunks] == expected
    assert_same(compacted, static)
    np.testing.assert_array_equal(compacted.kept, static.kept)


@pytest.mark.full
def test_a_module_without_a_cache_of_its_own_lets_rows_leave_too():
    """Through models/flax_adapter.py, whose cache is the rows themselves."""
    plain = flax_adapter.from_flax(
        lambda p, x: MODEL.hidden(p, x), MODEL.logits, MODEL.init, VOCAB, CONFIG.width, CONFIG.max_length
    )
    fresh = MODEL.init(jax.random.key(0))
    given, rules = prompts().replace(limit=jnp.asarray(LIMITS, jnp.int32)), spec(max_tokens=18, stop=())
    found, chunks = generate.traced(plain, fresh, given, rules, KEY, n=2, options=Options(chunk=3))
    assert [rows for rows, _ in chunks] == [16, 8, 8, 8, 8, 8]
    assert_same(found, generate.generate(MODEL, fresh, given, rules, KEY, n=2, options=Options(chunk=3)))
    assert_same(found, generate.generate(plain, fresh, given, rules, KEY, n=2, options=Options(chunk=3, slots=4)))


@pytest.mark.parametrize(
    "shape", [sharding.MeshConfig(), sharding.MeshConfig(data=2, fsdp=2, tensor=2)], ids=["data=8", "2x2x2"]
)
def test_output_does_not_depend_on_devices(params, sampled, shape):
    given = prompts()
    mesh = sharding.make_mesh(shape)
    placed = jax.device_put(params, sharding.shardings(transformer.param_specs(CONFIG), mesh))
    before = decode.advance._cache_size()
    with jax.set_mesh(mesh):
        spread = generate.generate(MODEL, placed, sharding.shard_batch(given, mesh), spec(), KEY, n=2, options=Options(3))
    assert decode.advance._cache_size() == before + 1  # shardings are the same before and after a chunk
    assert_same(spread, sampled)
    for leaf in jax.tree.leaves(spread):
        assert leaf.sharding.is_equivalent_to(sharding.batch_sharding(mesh), leaf.ndim)


def test_streams_are_named_by_key_uid_sample_and_position(params):
    given = take(prompts(), [1] * 8)
    one_uid = responses(generate.generate(MODEL, params, given, spec(), KEY, n=2))
    assert one_uid == one_uid[:2] * 8
    uids = responses(generate.generate(MODEL, params, given.replace(uid=jnp.arange(8)), spec(), KEY, n=2))
    keyed = responses(generate.generate(MODEL, params, given, spec(), jax.random.key(8), n=2))
    assert len({str(response) for response in one_uid[:2] + uids + keyed[:2]}) > 15  # of 20; short ones may agree
    numbers = uniforms(KEY, jnp.repeat(jnp.arange(20), 5), jnp.tile(jnp.arange(5), 20), 30)
    assert len(np.unique(numbers)) > 2990  # of 3000: 23 bits collide now and then, reused streams would by hundreds
    assert abs(float(numbers.mean()) - 0.5) < 0.02


# ------------------------------------------------------------------------------------------------ programs


def test_one_program_for_each_shape_and_spec(params):
    counted = (decode.start, decode.advance, decode.finish)
    before = [f._cache_size() for f in counted]
    for seed in range(3):
        equal = spec(max_tokens=9, top_p=0.77)  # an equal spec is the same spec
        generate.generate(MODEL, params, prompts(), equal, jax.random.key(seed), n=2, version=seed, options=Options(3))
    assert [f._cache_size() for f in counted] == [b + 1 for b in before]


def test_decoding_stops_when_all_rows_have_ended(params):
    rules = spec(stop=tuple(range(VOCAB)))
    rollout, chunks = generate.traced(MODEL, params, prompts(), rules, KEY, options=Options(chunk=5))
    assert chunks == [(8, 5)]
    assert rollout.finished.all()
    assert rollout.response_len.tolist() == [1] * 8


def test_the_cache_is_donated(params):
    given, rules, shape = prompts(), spec(), Shape(n=2, width=10, cache=CacheConfig())
    weights = decode.decode_params(MODEL, params)
    state = decode.start(MODEL, rules, shape, 10, weights, given, KEY, None)
    decode.advance(MODEL, rules, 5, weights, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache["response"]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((weights, params)))


def test_bad_input_is_refused_with_the_numbers_and_the_fix(params):
    given = prompts()

    def refuse(match, given=given, rules=None, n=1, **changes):
        with pytest.raises(ValueError, match=match):
            generate.generate(MODEL, params, given, rules or spec(), KEY, n, options=Options(**changes))

    refuse(
        r"6 \+ max_tokens 19 = 25 exceeds the model's context of 24: cut prompts to 5 .* lower max_tokens to 18",
        rules=spec(max_tokens=19),
    )
    refuse(r"lengths 0 \.\. 6 must be in 1 \.\. 6", given.replace(length=given.length.at[0].set(0).at[1].set(6)))
    refuse(r"lengths . \.\. 7 must be in 1 \.\. 6", given.replace(length=given.length.at[0].set(7)))
    for wrong in (48, -1):
        tokens = given.tokens.at[3, 0].set(wrong)
        refuse(rf"prompt 3 has the id {wrong} at place 0, outside the vocabulary 0 \.\. 47", given.replace(tokens=tokens))
    refuse(r"token ids \[48\] outside the vocabulary 0 \.\. 47", rules=spec(stop=(2, 48)))
    refuse(r"token ids \[-1\]", rules=spec(pad=-1))
    refuse("n=0", n=0)
    refuse("chunk=0", chunk=0)
    refuse("slots=-1 at least 0", slots=-1)
    refuse("halvings=-1, slots=0 at least 0", halvings=-1)
    refuse(r"slots=5 must be a multiple of n=2 samples times 1 .* choose 4", n=2, slots=5)
    refuse("stop_strings=.* need a stop_table with a column for each of 48 ids", rules=spec(stop_strings=("x",)))
    refuse("cache dtype 'float8' is not known: choose one of float32, bfloat16, int8", cache=CacheConfig("float8"))
    checks.numbers(MODEL, given, spec(max_tokens=18), 1, 8, 3, 8, 0)  # the longest that fits


def test_a_cache_larger_than_the_memory_is_refused_before_it_is_made(params, monkeypatch):
    given, rules = prompts(), spec()
    # Keys and values of one layer, two heads of 8 numbers, 4 bytes each: 8 prompts of 6 tokens, 16 responses of 10.
    held = 2 * 2 * 8 * 4 * (8 * 6 + 16 * 10)
    found = generate.cache_bytes(MODEL, given, rules, 2)
    assert held < found < 1.1 * held  # beside them lengths and the table of rotations
    with monkeypatch.context() as patch:
        patch.setattr(checks.os, "sysconf", lambda name: 100)  # 100 pages of 100 bytes
        with pytest.raises(ValueError, match=r"take 0\.0 GiB a device, more than its 0\.0 GiB: set slots to fewer rows"):
            generate.generate(MODEL, params, given, rules, KEY, 2)
    half = generate.cache_bytes(MODEL, given, rules, 2, Options(cache=CacheConfig("bfloat16")))
    assert found - half == held // 2
    assert generate.cache_bytes(MODEL, given, rules, 2, Options(slots=4)) < 0.4 * found
