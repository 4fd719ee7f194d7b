"""Rows in slots, narrow caches, caches that grow, stop strings, streams: the same responses, whatever the way they are made."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sampling_cases import CONFIG, EOS, KEY, MODEL, VOCAB, assert_same, prompts, responses, spec, take, weights

from jaxrlhf.algorithms import ppo
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Prompts, Rollout
from jaxrlhf.models import kv_cache, transformer
from jaxrlhf.models.model import CacheConfig
from jaxrlhf.sampling import decode, generate, rollout, stop_strings
from jaxrlhf.sampling.generate import Options
from jaxrlhf.training import objective, step

LETTERS = [b"", b"", b""] + [bytes([97 + i % 5]) * (1 + i // 30) for i in range(3, VOCAB)]  # a .. e, later ones twice
# Every kind of layer that decoding knows: a window, none, grouped heads, learned norms, soft caps.
VARIED = transformer.build(
    dataclasses.replace(CONFIG, layers=2, kv_heads=1, windows=(3, 0), attention_cap=20.0, rope_local_theta=100.0)
)


@pytest.fixture(scope="module")
def params():
    return weights()


# ------------------------------------------------------------------------------------------------ slots


@pytest.mark.parametrize(
    ("count", "n", "options", "shape"),
    [
        (21, 2, Options(chunk=3, slots=32), None),  # refilled by 2 prompts: half of the last refill is a filler
        pytest.param(
            21, 4, Options(chunk=5, slots=32, least=8), sharding.MeshConfig(data=2, fsdp=2, tensor=2), marks=pytest.mark.full
        ),
        pytest.param(40, 1, Options(chunk=3, slots=16), sharding.MeshConfig(), marks=pytest.mark.full),
    ],
    ids=["one", "2x2x2", "data=8"],
)
def test_slots_give_what_a_wave_gives(params, count, n, options, shape):
    given = prompts(count).replace(limit=jnp.asarray(np.random.default_rng(0).integers(1, 19, count), jnp.int32))
    rules = spec(max_tokens=18, stop=(EOS,), top_p=0.9, replay=True, repetition_penalty=1.2)
    static = generate.generate(MODEL, params, given, rules, KEY, n, options=Options(chunk=18))
    if shape is None:
        slotted, chunks = generate.traced(MODEL, params, given, rules, KEY, n, options=options)
    else:
        mesh = sharding.make_mesh(shape)
        placed = jax.device_put(params, sharding.shardings(transformer.param_specs(CONFIG), mesh))
        with jax.set_mesh(mesh):
            # 21 prompts do not divide over 4 devices: they stay whole, and so do their rows.
            split = sharding.shard_batch(given, mesh) if count % mesh.size == 0 else given
            slotted, chunks = generate.traced(MODEL, placed, split, rules, KEY, n, options=options)
    assert chunks[0][0] == max(rows for rows, _ in chunks) == options.slots
    assert_same(slotted, static)
    np.testing.assert_array_equal(slotted.kept, static.kept)


@pytest.mark.full
def test_slots_serve_every_kind_of_layer():
    fresh, given = weights(VARIED), prompts(12)
    rules = spec(max_tokens=18, stop=(EOS,))
    static = generate.generate(VARIED, fresh, given, rules, KEY, options=Options(chunk=18))
    assert len({len(response) for response in responses(static)}) > 3
    assert_same(generate.generate(VARIED, fresh, given, rules, KEY, options=Options(chunk=4, slots=4)), static)
    logprobs, _ = rollout.score_rollout(VARIED, fresh, static, rules)
    np.testing.assert_allclose(static.logprobs, logprobs, atol=5e-5)


def test_slots_are_busy(params):
    """Rows x steps that write a token, of lengths as answers have them: 16 slots for 192 rows."""
    lengths = np.clip(np.round(5 * np.exp(0.8 * np.random.default_rng(0).normal(size=192))), 1, 18)
    given = prompts(192).replace(limit=jnp.asarray(lengths, jnp.int32))
    rules = spec(max_tokens=18, stop=())
    found, chunks = generate.traced(MODEL, params, given, rules, KEY, options=Options(chunk=2, slots=16))
    assert found.response_len.tolist() == lengths.tolist()
    assert (
        lengths.sum() / sum(rows * steps for rows, steps in chunks) > 0.75
    )  # in chunks of 2, a row of 7 tokens wastes half a step on average


# ------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize(("dtype", "gap", "slots"), [("bfloat16", 0.08, 0), ("int8", 0.15, 4)])
def test_a_narrow_cache_moves_log_probs_a_little(params, dtype, gap, slots):
    """`gap` nats: keys and values rounded to 8 or 7 bits, with logits up to 6 of a model whose head is 20 times too large."""
    given, options = prompts(), Options(cache=CacheConfig(dtype), slots=slots)
    found = generate.generate(MODEL, params, given, spec(), KEY, n=2, options=options)
    logprobs, _ = rollout.score_rollout(MODEL, params, found, spec())
    difference = float(np.abs(found.logprobs - logprobs).max())
    assert 1e-4 < difference < gap  # the cache is narrow, and the log-probs say which policy sampled


def test_int8_rounds_to_the_nearest_of_each_token_and_head():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 8)).astype(np.float32) * np.float32([1e-3, 1, 50, 0, 7])[:, None]
    kept = kv_cache.keep(jnp.asarray(x), "int8")
    assert kept.values.dtype == jnp.int8
    np.testing.assert_array_equal(np.abs(kept.values).max(-1)[:, :, [0, 1, 2, 4]], 127)
    back = np.asarray(kept.values, np.float64) * np.asarray(kept.scale)[..., None]
    assert (np.abs(back - x) <= 0.501 * np.asarray(kept.scale)[..., None]).all()
    query = np.random.default_rng(1).normal(size=(2, 3, 4, 8)).astype(np.float32)
    exact = np.einsum("bkme,bkse->bkms", query, back)
    np.testing.assert_allclose(kv_cache.scores(jnp.asarray(query), kept), exact, rtol=1e-5, atol=1e-4)
    share = np.random.default_rng(2).random((2, 3, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(
        kv_cache.mixed(jnp.asarray(share), kept), np.einsum("bkms,bkse->bkme", share, back), rtol=1e-5, atol=1e-4
    )


def test_a_cache_that_grows_gives_the_same(params, monkeypatch):
    given, rules = prompts(), spec(max_tokens=18, stop=(EOS,))
    static = generate.generate(MODEL, params, given, rules, KEY, n=2, options=Options(chunk=5))
    rooms, grow = [], decode.grow
    monkeypatch.setattr(generate, "GROWING", 12)
    monkeypatch.setattr(decode, "grow", lambda *args: rooms.append(args[1]) or grow(*args))
    grown = generate.generate(MODEL, params, given, rules, KEY, n=2, options=Options(chunk=5))
    assert rooms == [8]  # from 10, the next whole chunk after a half, to 18
    assert_same(grown, static)


# ------------------------------------------------------------------------------------------------ ten thousand tokens


@pytest.mark.full
def test_ten_thousand_tokens_are_the_same_however_they_are_made():
    """Batches of 1 and 64, other orders and n, static, compacted, in slots, on 1 and 8 devices: the same tokens."""
    shape = dataclasses.replace(CONFIG, max_length=170)
    model = transformer.build(shape)
    params, rules = weights(model), spec(max_tokens=160, stop=(), top_p=0.9)
    limit = np.clip(np.round(80 * np.exp(0.6 * np.random.default_rng(0).normal(size=64))), 1, 160)
    given = prompts(64).replace(limit=jnp.asarray(2 * limit, jnp.int32))

    def tokens(given: Prompts, n: int = 2, **options) -> list[list[int]]:
        return responses(generate.generate(model, params, given, rules, KEY, n, options=Options(16, **options)))

    static = tokens(given, least=128)
    assert sum(map(len, static)) > 10_000
    assert tokens(given) == static
    assert tokens(given, slots=32) == static
    order = np.random.default_rng(1).permutation(64)
    assert tokens(take(given, order), slots=16) == [static[2 * i + j] for i in order for j in (0, 1)]
    assert tokens(given, n=1) == static[::2]
    alone = [tokens(take(given, [i]), n=1) for i in range(64)]
    assert [response for one in alone for response in one] == static[::2]
    mesh = sharding.make_mesh(sharding.MeshConfig())
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(transformer.param_specs(shape), mesh))
        spread = generate.generate(model, placed, sharding.shard_batch(given, mesh), rules, KEY, 2, options=Options(16))
    assert responses(spread) == static


# ------------------------------------------------------------------------------------------------ stop strings


def text(response: list[int]) -> str:
    return b"".join(LETTERS[i] for i in response).decode()


@pytest.mark.parametrize("slots", [0, 4])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(params, slots):
    stops = ("ba", "ccc", "ed")
    rules, given = spec(max_tokens=18, stop=(EOS,), stop_strings=stops), prompts(16)
    table = jnp.asarray(stop_strings.table(stops, LETTERS, VOCAB))
    cut = generate.generate(MODEL, params, given, rules, KEY, options=Options(slots=slots), stop_table=table)
    whole = generate.generate(MODEL, params, given, dataclasses.replace(rules, stop_strings=()), KEY)
    stopped = 0
    for short, long, finished in zip(responses(cut), responses(whole), cut.finished.tolist(), strict=True):
        assert long[: len(short)] == short
        found = [any(stop in text(long[: t + 1]) for stop in stops) for t in range(len(long))]
        want = found.index(True) + 1 if True in found else len(long)
        assert len(short) == want
        assert finished == (True in found or long[-1] == EOS)
        stopped += True in found
    assert 4 < stopped < 16


def test_the_table_finds_what_a_search_of_the_text_finds():
    rng = np.random.default_rng(0)

    def words(count: int, longest: int) -> list[str]:
        return ["".join(rng.choice(list("ab€"), rng.integers(1, longest + 1))) for _ in range(count)]

    for _ in range(40):
        strings, pieces = words(rng.integers(1, 4), 5), [b"", *(word.encode() for word in words(12, 3))]
        pieces.append("€".encode()[:1])  # half a character
        table, state, so_far = stop_strings.table(strings, pieces, 20), stop_strings.START, b""
        for token in rng.integers(0, len(pieces), 40):
            state, so_far = table[state, token], so_far + pieces[token]
            assert (state == len(table) - 1) == any(string.encode() in so_far for string in strings)


def test_stop_strings_must_be_strings():
    for wrong in ((), ("a", "")):
        with pytest.raises(ValueError, match="give one or more, none of them empty"):
            stop_strings.table(wrong, LETTERS, VOCAB)
    for wrong in ("ab", ("a", "")):
        with pytest.raises(ValueError, match="must be a tuple of strings, none of them empty"):
            spec(stop_strings=wrong)


# ------------------------------------------------------------------------------------------------ streams


def test_a_stream_gives_the_tokens_of_generate(params):
    given, rules = prompts(), spec(stop=(EOS,))
    want = responses(generate.generate(MODEL, params, given, rules, KEY, n=2))
    for chunk in (1, 4):
        got: list[list[int]] = [[] for _ in range(16)]
        pieces = list(generate.stream(MODEL, params, given, rules, KEY, n=2, options=Options(chunk)))
        assert len(pieces) == -(-max(map(len, want)) // chunk)
        for piece in pieces:
            for row, tokens in zip(got, piece, strict=True):
                row.extend(tokens)
        assert got == want


def test_a_stream_that_is_closed_does_no_more(params, monkeypatch):
    steps, advance = [], decode.advance
    monkeypatch.setattr(decode, "advance", lambda *args: steps.append(args[2]) or advance(*args))
    stream = generate.stream(MODEL, params, prompts(), spec(stop=()), KEY)
    next(stream), next(stream)
    stream.close()
    assert steps == [1, 1]
    with pytest.raises(ValueError, match="slots=4: a stream has all its rows at once"):
        next(generate.stream(MODEL, params, prompts(), spec(), KEY, options=Options(slots=4)))


# ------------------------------------------------------------------------------------------------ programs

PROGRAMS = ("_decode_changes", "start", "start_slots", "refill", "advance", "halve", "grow", "finish")


def compiled() -> dict[str, int]:
    return {name: getattr(decode, name)._cache_size() for name in PROGRAMS}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(chunk=3), {"start": 1, "advance": 6, "halve": 4, "grow": 3, "finish": 3}),
        (Options(chunk=3, slots=16), {"start_slots": 1, "refill": 1, "advance": 2, "halve": 1, "finish": 2}),
    ],
    ids=["wave", "slots"],
)
def test_warm_leaves_nothing_to_compile(params, monkeypatch, options, expected):
    monkeypatch.setattr(generate, "GROWING", 12)
    rules = spec(max_tokens=18, stop=(), min_p=0.011 if options.slots else 0.012)  # programs of no other test
    drawn = np.random.default_rng(0)

    def given() -> Prompts:
        return prompts(32).replace(limit=jnp.asarray(np.clip(drawn.geometric(0.2, 32), 1, 18), jnp.int32))

    before = compiled()
    generate.warm(MODEL, params, given(), rules, KEY, options=options)
    after = compiled()
    made = {name: after[name] - before[name] for name in PROGRAMS if after[name] > before[name]}
    made.pop("_decode_changes", None)  # of the model alone: another test may have made it
    assert made == expected
    assert sum(made.values()) + 1 <= 24
    for seed in range(6):
        generate.generate(MODEL, params, given(), rules, jax.random.key(seed), options=options)
    assert compiled() == after


def test_every_step_says_what_it_was(params):
    """Log-probs of a rollout in slots, kept sets replayed, against the scorer."""
    rules = spec(max_tokens=12, stop=(EOS,), top_p=0.9, replay=True, repetition_penalty=1.3, min_tokens=2, forbidden=(0, 1))
    found: Rollout = generate.generate(MODEL, params, prompts(12), rules, KEY, n=2, options=Options(chunk=4, slots=8))
    experience = rollout.experience(MODEL, {"policy": params}, {"reference": params}, found, rules)
    np.testing.assert_allclose(experience.logprobs, found.sampled_logprobs, atol=5e-5)
    np.testing.assert_allclose(experience.ref_logprobs, found.logprobs, atol=5e-5)


@pytest.mark.full
def test_twenty_iterations_of_ppo_compile_nothing_after_the_first():
    """Sampling is warmed up, the learner by one iteration; lengths differ, so each iteration wants other programs."""
    model = transformer.build(dataclasses.replace(CONFIG, max_length=40))
    rules = spec(max_tokens=30, stop=(EOS, 5))
    head = {"weight": jnp.zeros(CONFIG.width), "bias": jnp.zeros([])}
    params = {"policy": weights(model), "value": head}
    frozen, config = {"reference": params["policy"]}, ppo.Config(epochs=1, minibatches=1)
    update = optax.adam(1e-2)
    state = step.init_state(params, update, KEY, ppo.init(config))
    outputs = objective.make_outputs(model, rules, entropy=True, values=True, trunk="policy")
    run_epochs = step.make_epochs(outputs, ppo.loss, config, update, 1, 1)
    prepare = jax.jit(ppo.prepare, static_argnames="config")
    options = rollout.Options(generation=Options(chunk=5))
    drawn, compiled_in, sizes = np.random.default_rng(0), [], set()

    def listen(event: str, seconds: float, **unused) -> None:
        if event.endswith("backend_compile_duration"):
            compiled_in.append(event)

    def given() -> Prompts:
        return prompts(64).replace(limit=jnp.asarray(np.clip(drawn.geometric(0.15, 64), 1, 30), jnp.int32))

    def iterate(state, i: int):
        found = given()
        experience = rollout.collect(model, state.params, frozen, found, rules, jax.random.key(i), version=i, options=options)
        experience = dataclasses.replace(experience, score=experience.rollout.response_len * 0.1)
        batch, kept, _ = prepare(experience, state.algorithm, config=config)
        return run_epochs(dataclasses.replace(state, algorithm=kept), frozen, batch)[0]

    generate.warm(model, state.params["policy"], given(), rules, KEY, options=options.generation)
    state = iterate(state, 0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for i in range(1, 20):
            state = iterate(state, i)
            chunks = generate.traced(model, state.params["policy"], given(), rules, KEY, options=options.generation)[1]
            sizes |= {rows for rows, _ in chunks}
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled_in == []
    assert sizes > {64, 8}
