"""Responses that are stopped early and carried on: none is lost, doubled or drawn anew, and each token keeps its log-prob."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_cases import CONFIG, EOS, KEY, MODEL, VOCAB, prompts, responses, spec, take, weights

from jaxrlhf.core import sharding
from jaxrlhf.core.types import Rollout
from jaxrlhf.models import transformer
from jaxrlhf.models.model import CacheConfig
from jaxrlhf.sampling import generate, rollout, stop_strings, stragglers
from jaxrlhf.sampling.generate import Options

N, BATCH, LEFT = 2, 8, 4  # samples, prompts a batch, prompts under way besides
CHUNK = Options(chunk=2, least=4)


def varied(**changes):
    """Responses of very different lengths, so that some go on for longer than a batch."""
    return spec(**{"max_tokens": 18, "stop": (EOS, *range(5, 14)), **changes})


def batches(count: int = 3) -> list:
    """Prompts of some batches, and of those that are under way at first."""
    every = prompts(count * BATCH + LEFT)
    parts = [take(every, np.arange(i * BATCH, (i + 1) * BATCH)) for i in range(count)]
    return [*parts, take(every, np.arange(count * BATCH, count * BATCH + LEFT))]


def by_name(found: Rollout) -> dict:
    """{(group, sample): (tokens, log-probs, log-probs of what was drawn from)} of the responses."""
    names = zip(found.group.tolist(), found.sample.tolist(), strict=True)
    values = zip(responses(found), np.asarray(found.logprobs), np.asarray(found.sampled_logprobs), strict=True)
    rows = [(row, a[: len(row)], b[: len(row)]) for row, a, b in values]
    named = dict(zip(names, rows, strict=True))
    assert len(named) == len(rows)
    return named


def carried(model, params, rules, options=CHUNK, count: int = 3, **others):
    """What some batches give one after another, all with one key; their prompts; and what is left."""
    *given, first = batches(count)
    begun, found, asked = stragglers.begin(first, model, rules, N), [], []
    for version, each in enumerate(given):
        full, their, begun, _ = stragglers.carry_on(model, params, each, begun, rules, KEY, N, version, options, **others)
        found.append(full)
        asked.append(their)
    return found, asked, begun


RULES = {
    "plain": {},
    "constrained": {"min_tokens": 3, "repetition_penalty": 1.3, "top_p": 0.8, "replay": True},
    "greedy": {"greedy": True},
}


@pytest.mark.parametrize("name", ["plain", pytest.param("constrained", marks=pytest.mark.full), "greedy"])
def test_a_response_that_was_stopped_is_the_same_as_one_that_was_not(name):
    params, rules = weights(), varied(**RULES[name])
    found, asked, left = carried(MODEL, params, rules)
    whole = jax.tree.map(lambda *x: jnp.concatenate(x), *batches())
    want = by_name(generate.generate(MODEL, params, whole, rules, KEY, N))
    got = {k: v for part in found for k, v in by_name(part).items()}
    assert len(got) == 3 * BATCH * N  # none twice
    for key, (tokens, *logprobs) in got.items():
        assert tokens == want[key][0], key
        np.testing.assert_allclose(logprobs, want[key][1:], atol=3e-5)
    for key, (tokens, *_) in by_name(left.rollout).items():  # none lost, and as far as it is, the same
        assert key not in got
        assert tokens == want[key][0][: len(tokens)]
    assert len(got) + left.row.size == len(want)
    for part, prompt in zip(found, asked, strict=True):
        ended = part.finished | (part.response_len == rules.max_tokens)
        assert bool(ended.all())
        np.testing.assert_array_equal(np.repeat(prompt.uid, N), part.group)
        np.testing.assert_array_equal(np.repeat(prompt.row, N), part.group - 100)
        np.testing.assert_array_equal(np.repeat(prompt.length, N), part.prompt_len)
        assert sorted(part.sample.tolist()) == sorted(list(range(N)) * BATCH)
    assert any((part.version < i).any() for i, part in enumerate(found))  # or this test carries nothing on


def test_the_longest_are_left_and_the_oldest_come_first():
    params, rules = weights(), varied()
    (first, *_), _, left = carried(MODEL, params, rules, count=1)
    assert left.row.size == LEFT * N
    whole = jax.tree.map(lambda *x: jnp.concatenate(x), *batches(1))
    want = by_name(generate.generate(MODEL, params, whole, rules, KEY, N))
    longest = {group: max(len(want[group, s][0]) for s in range(N)) for group, _ in want}
    given = [longest[g] for g in first.group.tolist()[::N]]
    assert -(-max(given) // 2) <= -(-min(longest[g] for g in left.rollout.group.tolist()) // 2)  # in chunks of two steps
    chunks = [-(-length // 2) for length in given]
    assert chunks == sorted(chunks)


def test_tokens_keep_the_log_probs_that_they_were_drawn_with():
    rules, old = varied(), weights()
    new = old | {"head": old["head"] * 0.7}
    first, *later, begun = batches(4)
    begun = stragglers.begin(begun, MODEL, rules, N)
    *_, left, _ = stragglers.carry_on(MODEL, old, first, begun, rules, KEY, N, 5, CHUNK)
    names = zip(left.rollout.group.tolist(), left.rollout.sample.tolist(), strict=True)
    before = dict(zip(names, left.rollout.response_len.tolist(), strict=True))
    mixed = 0
    for version, each in enumerate(later, 6):
        full, _, left, _ = stragglers.carry_on(MODEL, new, each, left, rules, KEY, N, version, CHUNK)
        under = [np.asarray(rollout.score_rollout(MODEL, params, full, rules)[0]) for params in (old, new)]
        for i, name in enumerate(zip(full.group.tolist(), full.sample.tolist(), strict=True)):
            at, length = before.get(name, 0), int(full.response_len[i])
            np.testing.assert_allclose(full.logprobs[i, :at], under[0][i, :at], atol=3e-5)
            np.testing.assert_allclose(full.logprobs[i, at:length], under[1][i, at:length], atol=3e-5)
            assert int(full.version[i]) == 5 if at else int(full.version[i]) >= 6
            mixed += 0 < at < length
    assert mixed > 0


@pytest.mark.full
def test_stop_strings_are_found_across_the_place_where_a_row_stopped():
    params, rules = weights(), varied(stop=(EOS,), stop_strings=("abba", "baab"))
    pieces = [b"", b"", b"", *(bytes([97 + i % 2]) for i in range(VOCAB - 3))]
    table = jnp.asarray(stop_strings.table(rules.stop_strings, pieces, VOCAB))
    found, *_ = carried(MODEL, params, rules, stop_table=table)
    whole = jax.tree.map(lambda *x: jnp.concatenate(x), *batches())
    want = by_name(generate.generate(MODEL, params, whole, rules, KEY, N, stop_table=table))
    for part in found:
        for key, (tokens, *_) in by_name(part).items():
            assert tokens == want[key][0]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_caches_are_carried_on(dtype):
    params, rules = weights(), varied()
    found, *_ = carried(MODEL, params, rules, dataclasses.replace(CHUNK, cache=CacheConfig(dtype)))
    exact, *_ = carried(MODEL, params, rules)
    narrow, want = ({k: v[0] for part in parts for k, v in by_name(part).items()} for parts in (found, exact))
    same = [narrow[key] == want[key] for key in narrow.keys() & want.keys()]
    assert np.mean(same) > 0.7  # rounding changes a draw now and then, and what follows it


@pytest.mark.full
def test_devices_change_nothing_and_no_batch_compiles_anew():
    params, rules = weights(), varied()
    alone, *_ = carried(MODEL, params, rules, count=4)
    *given, first = batches(4)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, sharding.shardings(transformer.param_specs(CONFIG), mesh))
    with jax.set_mesh(mesh):
        begun = sharding.shard_batch(stragglers.begin(first, MODEL, rules, N), mesh)
        sizes = []
        for i, each in enumerate(given):
            split = sharding.shard_batch(each, mesh)
            full, _, begun, _ = stragglers.carry_on(MODEL, placed, split, begun, rules, KEY, N, i, CHUNK)
            assert by_name(full).keys() == by_name(alone[i]).keys()
            np.testing.assert_array_equal(full.tokens, alone[i].tokens)
            sizes.append((stragglers._start._cache_size(), stragglers._part._cache_size()))
        # `_part` is another program where no row has left the batch yet.
        assert sizes[-1][0] == sizes[0][0]
        assert sizes[-1][1] <= sizes[0][1] + 1


def test_what_cannot_be_carried_on_is_refused():
    rules = varied()
    first, begun = batches(1)
    start = stragglers.begin(begun, MODEL, rules, N)

    def carry(begun=start, n=N, options=CHUNK, given=first):
        return stragglers.carry_on(MODEL, weights(), given, begun, rules, KEY, n, options=options)

    with pytest.raises(ValueError, match="slots=4 with stragglers"):
        carry(options=Options(slots=4))
    with pytest.raises(ValueError, match="8 begun rows are not groups of n=3"):
        carry(n=3)
    with pytest.raises(ValueError, match="pad the prompts of all batches to one width"):
        carry(given=prompts(8, width=7))
