"""flax.linen and flax.nnx modules as the policy, through the same functions as our own transformer."""

from __future__ import annotations

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.algorithms import lm
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.models import heads
from jaxrlhf.sampling import generate
from jaxrlhf.training import objective, step

VOCAB = 13


@pytest.fixture(scope="module")
def page():
    """What docs/flax_modules.md defines, all its code run."""
    path = pathlib.Path(__file__).parent.parent / "docs" / "flax_modules.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
    names = {}
    exec(compile(code, str(path), "exec"), names)
    return names


@pytest.fixture(params=["linen_model", "nnx_model"])
def model(request, page):
    return page[request.param]


SPEC = SamplingSpec(temperature=0.8, max_tokens=7, stop=(2,), min_tokens=2, forbidden=(0, 1))


def prompts(count: int = 6) -> Prompts:
    random = np.random.default_rng(0)
    return Prompts(
        tokens=jnp.asarray(random.integers(3, VOCAB, (count, 5), dtype=np.int32)),
        length=jnp.asarray([1, 5, 3, 2, 4, 5][:count]),
        uid=jnp.arange(count),
        row=jnp.arange(count),
    )


def test_sampled_logprobs_equal_teacher_forced_ones(model):
    params = model.init(jax.random.key(0))
    rollout = generate.generate(model, params, prompts(), SPEC, jax.random.key(1), n=2)
    states = heads.response_hidden(model.hidden(params, rollout.tokens), rollout.prompt_len, SPEC.max_tokens)
    place = np.minimum(rollout.prompt_len[:, None] + np.arange(SPEC.max_tokens), rollout.tokens.shape[1] - 1)
    tokens = jnp.take_along_axis(rollout.tokens, jnp.asarray(place), axis=1)
    logprobs, _ = heads.token_logprobs(model, params, states, tokens, SPEC)
    mask = np.arange(SPEC.max_tokens) < np.asarray(rollout.response_len)[:, None]
    np.testing.assert_allclose(np.where(mask, logprobs, 0), rollout.logprobs, atol=2e-5)
    assert (rollout.response_len >= 3).all()  # no end before two tokens were written
    assert not np.isin(np.asarray(tokens)[mask], SPEC.forbidden).any()


def test_prompts_padding_is_not_read(model):
    given = prompts()
    params = model.init(jax.random.key(0))
    garbage = jnp.where(jnp.arange(5) < given.length[:, None], given.tokens, 12)
    a, b = (
        generate.generate(model, params, given.replace(tokens=tokens), SPEC, jax.random.key(1))
        for tokens in (given.tokens, garbage)
    )
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_the_train_step_learns(model):
    """Fine-tuning on one response to each prompt until it is the likely one."""
    random = np.random.default_rng(1)
    tokens = random.integers(3, VOCAB, (8, 10), dtype=np.int32)
    batch = lm.responses(jnp.asarray(tokens), jnp.full(8, 3), jnp.full(8, 7), 7)
    train = step.make_train_step(objective.make_outputs(model), lm.loss, lm.Config(), optax.adam(0.02))
    state = step.init_state(model.init(jax.random.key(0)), optax.adam(0.02), jax.random.key(1))
    losses = []
    for _ in range(60):
        state, metrics = train(state, (), batch)
        losses.append(float(metrics["loss/lm"]))
    assert losses[0] > 2.0
    assert losses[-1] < 0.5 * losses[0]
    assert train.programs() == 1


def test_packed_rows_and_long_ones_are_refused(model):
    params = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match="one text a row, without segments"):
        model.hidden(params, jnp.zeros((1, 4), int), jnp.ones((1, 4), int))
    with pytest.raises(ValueError, match="25 tokens exceed max_length=24"):
        model.hidden(params, jnp.zeros((1, 25), int))
