"""The engine of the service: a row depends on its own request alone, slots are refilled, policies change between chunks."""

from __future__ import annotations

import contextlib
import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.core.types import Draw, Prompts, SamplingSpec
from jaxrlhf.data import arithmetic
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.sampling import decode, filters, generate
from jaxrlhf.serving import engine
from jaxrlhf.serving.engine import Ask, Busy, Engine, Options, Policy
from jaxrlhf.serving.texts import Answer, shown

WIDTH, MOST = 16, 12


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train((prompt for prompt, _ in arithmetic.demonstrations(200, 0.5, 1)), 259)


def policy_of(tokenizer, seed: int, max_tokens: int = MOST) -> Policy:
    model = transformer.build(TransformerConfig(tokenizer.vocab_size, 16, 1, 2, 2, 8, 32, WIDTH + MOST))
    params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(seed)))  # peaked: one row is not another
    return Policy(model, params, tokenizer, SamplingSpec(1.0, max_tokens, (tokenizer.eos,)), f"v{seed}")


@pytest.fixture(scope="module")
def policy(tokenizer):
    return policy_of(tokenizer, 0)


@pytest.fixture(scope="module")
def running(policy):
    with contextlib.closing(Engine(policy, Options(slots=8, width=WIDTH, chunk=4, waiting=100))) as made:
        yield made


def asks(policy: Policy, count: int, seed: int = 0) -> list[Ask]:
    """Requests of every kind: lengths, limits, temperatures (0 too) and shares."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        ids = (policy.tokenizer.bos, *rng.integers(3, 250, rng.integers(0, WIDTH)).tolist())
        temperature, top_p = (0.0, 0.5, 1.0, 1.7)[i % 4], (1.0, 0.9, 0.3)[i % 3]
        made.append(Ask(ids, int(rng.integers(2**31)), int(rng.integers(1, MOST + 1)), temperature, top_p))
    return made


class Heard:
    """What one row is given."""

    def __init__(self):
        self.tokens, self.logprobs, self.end, self.pieces, self.ended = [], [], "", 0, threading.Event()

    def __call__(self, piece):
        assert not self.end, "a piece after the last"
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.pieces += 1
        if piece.end:
            self.end = piece.end
            self.ended.set()


class Held(Heard):
    """The engine's thread stands still at this row's first piece until `go`."""

    def __init__(self):
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, piece):
        super().__call__(piece)
        self.begun.set()
        assert self.go.wait(60)


def answer(running: Engine, wanted: list[Ask]) -> list[Heard]:
    heard = [Heard() for _ in wanted]
    running.submit(running.bench, wanted, heard)
    for one in heard:
        assert one.ended.wait(60)
    return heard


def alone(policy: Policy, ask: Ask):
    """The tokens that `generate` gives for one request by itself, with all of it in the spec and nothing traced."""
    sure = ask.temperature == 0
    spec = dataclasses.replace(policy.spec, temperature=ask.temperature or 1.0, top_p=1.0 if sure else ask.top_p, greedy=sure)
    tokens = np.zeros((1, WIDTH), np.int32)
    tokens[0, : len(ask.ids)] = ask.ids
    one = np.array([ask.uid], np.int32)
    prompts = Prompts(tokens, np.array([len(ask.ids)], np.int32), one, one, limit=np.array([ask.max_tokens], np.int32))
    rollout = generate.generate(policy.model, policy.params, prompts, spec, jax.random.key(0))
    count, begin = int(rollout.response_len[0]), len(ask.ids)
    return rollout.tokens[0, begin : begin + count].tolist(), rollout.logprobs[0, :count], bool(rollout.finished[0])


def test_rows_are_those_that_generate_gives_for_each_alone(policy, running):
    """40 requests in 8 slots, of all temperatures and shares, against one batch of one row each with a spec of its own."""
    wanted = asks(policy, 40)
    heard = answer(running, wanted)
    for i in (0, 1, 2, 7):  # each temperature, each share: a spec of one's own is a program of one's own
        ask, one = wanted[i], heard[i]
        tokens, logprobs, finished = alone(policy, ask)
        assert one.tokens == tokens
        # A row of one has other sums than a row of eight.
        np.testing.assert_allclose(one.logprobs, logprobs, rtol=0, atol=2e-5)
        assert one.end == ("stop" if finished else "length")
    assert {one.end for one in heard} == {"stop", "length"}


def test_a_row_depends_on_nobody_else(policy, running):
    wanted = asks(policy, 24, 1)
    together, apart = answer(running, wanted), [answer(running, [ask])[0] for ask in wanted[:6]]
    turned = answer(running, wanted[::-1])[::-1]
    assert [one.tokens for one in together[:6]] == [one.tokens for one in apart]
    assert [(one.tokens, one.logprobs) for one in together] == [(one.tokens, one.logprobs) for one in turned]


def test_new_temperatures_compile_nothing(policy, running):
    answer(running, asks(policy, 12))
    before = decode.advance._cache_size(), decode.refill._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    answer(running, [dataclasses.replace(ask, temperature=0.123, top_p=0.456) for ask in asks(policy, 12)])
    assert (decode.advance._cache_size(), decode.refill._cache_size()) == before  # pyright: ignore[reportFunctionMemberAccess]


def test_a_row_that_is_given_up_leaves_its_slot(policy, running):
    long = [dataclasses.replace(ask, max_tokens=MOST, temperature=1.7, top_p=1.0) for ask in asks(policy, 16)]
    held = Held()
    heard: list[Heard] = [held, *(Heard() for _ in long[1:])]
    given = running.submit(running.bench, long, heard)
    assert held.begun.wait(60)
    running.cancel(given)
    held.go.set()
    (other,) = answer(running, [long[0]])
    assert other.end
    assert other.tokens == answer(running, [long[0]])[0].tokens
    assert [one.pieces for one in heard] == 8 * [1] + 8 * [0], "nothing after it was given up, and rows that waited never began"
    assert not running.bench.waiting


def test_what_is_refused(policy, running):
    ask = asks(policy, 1)[0]
    for wrong, said in (
        (dataclasses.replace(ask, ids=()), "0 tokens; 1 to 16"),
        (dataclasses.replace(ask, ids=(1,) * 17), "17 tokens; 1 to 16"),
        (dataclasses.replace(ask, max_tokens=0), "max_tokens=0: 1 to 12"),
        (dataclasses.replace(ask, max_tokens=MOST + 1), "max_tokens=13: 1 to 12"),
    ):
        with pytest.raises(ValueError, match=said):
            running.submit(running.bench, [wrong], [Heard()])
    with pytest.raises(Busy, match="requests wait"):
        running.submit(running.bench, [ask] * 101, [Heard() for _ in range(101)])
    with pytest.raises(ValueError, match="slots=0 must be at least 1"):
        Options(slots=0)
    with pytest.raises(ValueError, match="leaves no place for a prompt"):
        engine.Bench(dataclasses.replace(policy, spec=dataclasses.replace(policy.spec, max_tokens=99)), Options())


def test_a_swap_under_16_rows_drops_and_changes_none(policy, tokenizer):
    """Rows under way and waiting keep the weights that they began with; what is asked later gets the new ones."""
    other = policy_of(tokenizer, 1)
    wanted = [dataclasses.replace(ask, max_tokens=MOST) for ask in asks(policy, 16, 2)]
    with contextlib.closing(Engine(policy, Options(slots=4, width=WIDTH, chunk=1))) as made:
        held = Held()  # until the other policy is there
        heard = [held, *(Heard() for _ in wanted[1:])]
        made.submit(made.bench, wanted, heard)
        assert held.begun.wait(60)
        made.swap(other)
        assert made.bench.policy is other
        assert not made.settled
        held.go.set()
        after = answer(made, wanted)
        for one in heard:
            assert one.ended.wait(60)
        again = answer(made, wanted)
        assert made.settled, "the bench of the policy before is gone when it is empty"
    with contextlib.closing(Engine(policy, Options(slots=4, width=WIDTH, chunk=1))) as made:
        assert [one.tokens for one in heard] == [one.tokens for one in answer(made, wanted)]
    assert [one.tokens for one in after] == [one.tokens for one in again]
    assert [one.tokens for one in after] != [one.tokens for one in heard]


def test_closing_answers_what_was_asked(policy):
    made = Engine(policy, Options(slots=4, width=WIDTH))
    wanted = asks(policy, 12)
    heard = [Heard() for _ in wanted]
    made.submit(made.bench, wanted, heard)
    made.close()
    assert all(one.end in ("stop", "length") for one in heard)
    with pytest.raises(Busy, match="the service ends"):
        made.submit(made.bench, wanted[:1], [Heard()])


def test_a_chunk_that_fails_is_told_and_the_next_request_is_answered(policy, monkeypatch):
    with contextlib.closing(Engine(policy, Options(slots=4, width=WIDTH))) as made:
        wanted = asks(policy, 3)
        expected = [one.tokens for one in answer(made, wanted)]
        real, calls = decode.advance, []

        def broken(*given):
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("planted")
            return real(*given)

        monkeypatch.setattr(decode, "advance", broken)
        assert {one.end for one in answer(made, wanted)} == {"error"}
        assert [one.tokens for one in answer(made, wanted)] == expected


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_a_nucleus_of_each_is_that_of_all(share):
    logits = 3 * jax.random.normal(jax.random.key(3), (16, 500))
    spec = SamplingSpec(1.0, 1, (), top_p=share)
    shares = jnp.full(16, share).at[0].set(1.0)
    found = filters.nucleus_of_each(logits, shares)
    np.testing.assert_array_equal(found[1:], filters.apply(logits, spec)[1:])
    np.testing.assert_array_equal(found[0], logits[0])


def test_draws_that_do_not_fit_are_refused(policy):
    one, row = np.ones(1, np.int32), np.ones((1, 4), np.int32)

    def prompts(temperature=1.0, top_p=1.0):
        return Prompts(row, one, one, one, draw=Draw(np.array([temperature], np.float32), np.array([top_p], np.float32)))

    cases = [(prompts(-1.0), policy.spec, r"temperature=\[-1.0\]"), (prompts(top_p=0.0), policy.spec, r"top_p=\[0.0\]")]
    cases += [(prompts(), dataclasses.replace(policy.spec, top_p=0.9), "leave the spec at temperature 1")]
    for given, spec, said in cases:
        with pytest.raises(ValueError, match=said):
            generate.generate(policy.model, policy.params, given, spec, jax.random.key(0))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_an_answer_is_the_same_in_pieces_of_any_size(tokenizer, size):
    ids = tokenizer.encode(" one two stop here and on é", continuation=True)
    for stops in ((), ("stop",), ("two st", "stop"), ("é",), ("never",)):
        answer, told = Answer(tokenizer, stops, strip=True), ""
        for begin in range(0, len(ids), size):
            piece = ids[begin : begin + size]
            told += answer.add(piece, [0.5] * len(piece), "length" if begin + size >= len(ids) else "")
            if answer.end:
                break
        whole = " one two stop here and on é"
        cut = min((whole.find(stop) for stop in stops if stop in whole), default=len(whole))
        assert answer.text == whole[:cut]
        assert told == whole[:cut].lstrip()
        assert answer.end == ("stop" if cut < len(whole) else "length")
        assert len(answer.logprobs) == len(answer.tokens)
        assert stops == ("never",) or not stops or tokenizer.decode(answer.tokens, continuation=True).endswith(stops)


def test_what_a_person_sees():
    assert shown("one\n\nHum", ("\n\nHuman:",), ended=False) == "one"
    assert shown("one\n\nHum", ("\n\nHuman:",), ended=True) == "one\n\nHum"
    assert shown("caf\ufffd", (), ended=False) == "caf"
