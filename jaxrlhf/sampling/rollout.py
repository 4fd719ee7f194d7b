"""From prompts to experience: responses, their log-probs under learner and reference, and their values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from jaxrlhf.core import masking, offload, sharding
from jaxrlhf.core.types import Experience, Prompts, Rollout, SamplingSpec
from jaxrlhf.models import heads, roles
from jaxrlhf.models.model import Model
from jaxrlhf.sampling import generate


@dataclasses.dataclass(frozen=True)
class Apart:
    """Devices that only draw answers, while the others learn from those before (`experiments/apart.py`)."""

    devices: int = 0  # the last so many of all; 0: all devices draw and learn, in turns
    steps: int = 1  # k: weights are pushed to them every k iterations, and answers are of weights at most k old; 0: in turns
    mesh: sharding.MeshConfig = sharding.MeshConfig()  # of these devices

    def __post_init__(self):
        if min(self.devices, self.steps) < 0:
            raise ValueError(f"rollouts.apart.devices={self.devices}, steps={self.steps}: neither can be below 0")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a rollout is made and scored."""

    # Take the sampler's own log-probs for the learner's, which saves the old policy's pass, but for some rows, whose gap is
    # logged. PPO's ratio is then learner / sampler: at the first update not 1 but off by that gap, rounding in float32, more
    # with a narrow cache or in bfloat16, and the clip takes it for a change of the policy.
    reuse_sampler_logprobs: bool = False
    checked: int = 8  # rows that the learner reads all the same, at least; they learn from its own log-probs
    exact_kl: bool = False  # also the KL to the reference of the whole distribution at each token
    rows: int = 32  # of a device, scored at a time: a matter of memory and speed only
    generation: generate.Options = generate.Options()
    stragglers: int = 0  # prompts whose answers are left unfinished by each batch and go on in the next; 0: wait for all
    apart: Apart = Apart()


def collect(
    model: Model,
    params: dict[str, Any],
    frozen: dict[str, Any],
    prompts: Prompts,
    spec: SamplingSpec,
    key: PRNGKeyArray,
    n: int = 1,
    version: int | jax.Array = 0,
    options: Options = Options(),
) -> Experience:
    """Sample n responses to each prompt from `params["policy"]` and score them: see `generate.generate` and `experience`.

    Responses that stop early and go on in the next batch are `stragglers.carry_on`'s, which `experience` scores as any others.
    """
    rollout = generate.generate(model, params["policy"], prompts, spec, key, n, version, options.generation)
    return experience(model, params, frozen, rollout, spec, options)


def experience(
    model: Model,
    params: dict[str, Any],
    frozen: dict[str, Any],
    rollout: Rollout,
    spec: SamplingSpec,
    options: Options = Options(),
) -> Experience:
    """A rollout with the log-probs of `params["policy"]` and `frozen["reference"]` and, where `params` hold a value function
    (`models/roles.py`), its values. The score is 0 for the caller to replace; every row has weight 1.

    `values[:, t]` is the value before response token t; `bootstrap` that after the last token of a cut response, 0 after a
    finished one. Log-probs are of the policy (temperature and constraints, no filters), 0 past the end; with `spec.replay`
    the learner's, not the reference's, are renormalised over the kept sets, so that learner less reference estimates the KL
    of what was really drawn from.
    """
    return _experience(model, spec, options, params, frozen["reference"], rollout)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _experience(model, spec, options, params, reference, rollout) -> Experience:
    critic, reference = roles.has_value(params), offload.fetch(reference)
    own = rollout.sampled_logprobs if spec.replayed else rollout.logprobs
    width = own.shape[1]

    def score(args):
        part, own = args
        hidden: Any = None  # of the policy; not computed where the sampler's log-probs do
        if not options.reuse_sampler_logprobs or options.exact_kl:
            hidden = model.hidden(params["policy"], part.tokens)
        logprobs = own  # unless the learner computes them
        if not options.reuse_sampler_logprobs:
            logprobs = _logprobs(model, params["policy"], hidden, part, width, spec, kept=part.kept)[0]
        values = _values(*roles.value_states(model, params, part.tokens, hidden), part) if critic else (None, None)
        ref_hidden = model.hidden(reference, part.tokens)
        ref_logprobs = _logprobs(model, reference, ref_hidden, part, width, spec)[0]
        ref_kl = _token_kl(model, (params["policy"], reference), (hidden, ref_hidden), part, spec) if options.exact_kl else None
        return logprobs, *values, ref_logprobs, ref_kl

    logprobs, values, bootstrap, ref_logprobs, ref_kl = _by_rows(score, (rollout, own), options.rows)
    count, checked = rollout.tokens.shape[0], None
    if options.reuse_sampler_logprobs:
        some = _spread(count, options.checked)
        part = jax.tree.map(lambda x: x[some], rollout)
        hidden = model.hidden(params["policy"], part.tokens)
        learner = _logprobs(model, params["policy"], hidden, part, width, spec, kept=part.kept)[0]
        logprobs, checked = logprobs.at[some].set(learner), jnp.zeros(count, bool).at[some].set(True)
    return Experience(
        rollout=rollout,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        bootstrap=jnp.zeros(count) if bootstrap is None else bootstrap,
        score=jnp.zeros(count),
        weight=jnp.ones(count),
        ref_kl=ref_kl,
        checked=checked,
    )


experience_program = _experience  # (model, spec, options, params, reference, rollout), to be lowered ahead of its first call


def _spread(count: int, least: int) -> Int[Array, " k"]:
    """At least so many of `count` rows, evenly spread, as many on each device."""
    ways = sharding.ways()
    few = min(count, -(-max(least, 1) // ways) * ways)
    return jnp.arange(few) * (count // few)


def score_rollout(
    model: Model, policy: Any, rollout: Rollout, spec: SamplingSpec, rows: int = 32
) -> tuple[Float[Array, "b r"], Float[Array, "b r"]]:
    """Teacher-forced log-probs and entropies of the policy's distribution at every response token, 0 past the end."""
    return _score_rollout(model, spec, rows, policy, rollout)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score_rollout(model, spec, rows, policy, rollout):
    policy = offload.fetch(policy)

    def score(part: Rollout):
        return _logprobs(model, policy, model.hidden(policy, part.tokens), part, rollout.logprobs.shape[1], spec, entropy=True)

    return _by_rows(score, rollout, rows)


def stats(experience: Experience) -> dict[str, Float[Array, ""]]:
    """Length, share finished, and the gap between the learner's log-probs and the sampler's (nats a token, mean and largest).

    Where the sampler's log-probs are reused the gap is that of the rows that were checked. It is rounding: more of it than
    1e-4 in float32 says that sampler and scorer read different rows or rules. Answers that were begun under older weights
    (`stragglers`) have more; `rollout/age` is by how many iterations they are older, on average.
    """
    rollout = experience.rollout
    mask = masking.response_mask(rollout.response_len, rollout.logprobs.shape[1], rollout.written)
    if experience.checked is not None:
        mask = mask & experience.checked[:, None]
    own = rollout.logprobs if rollout.kept is None else rollout.sampled_logprobs
    gap = masking.masked(jnp.abs(experience.logprobs - own), mask)
    return {
        "rollout/length": rollout.response_len.mean(),
        "rollout/finished": rollout.finished.mean(),
        "rollout/age": (rollout.version.max() - rollout.version).mean(dtype=jnp.float32),
        "rollout/sampler_gap": masking.masked_mean(gap, mask),
        "rollout/sampler_gap_max": gap.max(),
    }


def _logprobs(
    model: Model,
    trunk: Any,
    hidden: Float[Array, "b t d"],
    rows: Any,
    width: int,
    spec: SamplingSpec | None,
    entropy: bool = False,
    kept: UInt32[Array, "b r w"] | None = None,
) -> tuple[Float[Array, "b r"], Float[Array, "b r"] | None]:
    """Log-probs and entropies of the response tokens of `rows` (tokens, prompt_len, response_len), 0 past the end."""
    tokens = heads.response_tokens(rows.tokens, rows.prompt_len, width)
    states = heads.response_hidden(hidden, rows.prompt_len, width)
    seen = heads.seen_from(rows.tokens, rows.prompt_len, model.vocab_size, spec)
    logprobs, entropies = heads.token_logprobs(model, trunk, states, tokens, spec, entropy, kept=kept, seen=seen)
    mask = masking.length_mask(rows.response_len, width)
    return masking.masked(logprobs, mask), None if entropies is None else masking.masked(entropies, mask)


def _token_kl(
    model: Model, trees: tuple[Any, Any], hidden: tuple[jax.Array, jax.Array], part: Rollout, spec: SamplingSpec
) -> Float[Array, "b r"]:
    """KL(policy || reference) of the whole distribution at each response token, 0 past the end."""
    width = part.logprobs.shape[1]
    states = heads.response_hidden(hidden[0], part.prompt_len, width), heads.response_hidden(hidden[1], part.prompt_len, width)
    seen = heads.seen_from(part.tokens, part.prompt_len, model.vocab_size, spec)
    found = heads.token_kl(model, *trees, states, spec, seen=seen)
    return masking.masked(found, masking.response_mask(part.response_len, width))


def _values(head: Any, hidden: Float[Array, "b t d"], part: Rollout) -> tuple[Float[Array, "b r"], Float[Array, " b"]]:
    """Values before each response token, and the value after the last one where the response was cut."""
    width = part.logprobs.shape[1]
    values = heads.values(head, heads.response_hidden(hidden, part.prompt_len, width))
    last = jnp.take_along_axis(hidden, (part.prompt_len + part.response_len - 1)[:, None, None], axis=1)[:, 0]
    after = jnp.where(part.finished, 0.0, heads.values(head, last))
    return masking.masked(values, masking.response_mask(part.response_len, width)), after


def _by_rows(function: Callable[[Any], Any], tree: Any, rows: int) -> Any:
    """`function` of about `rows` rows of a device at a time, so that logits stay in the cache; of all where no near number
    divides them. Of fewer, a mesh would gather all weights more often than the work is worth."""
    count, rows = jax.tree.leaves(tree)[0].shape[0], rows * sharding.ways()
    rows = next((size for size in range(rows, rows // 2, -1) if count % size == 0), count)
    if rows == count:
        return function(tree)
    # Part i holds rows i, i + parts, ...: each part then lies on all devices that share the batch.
    split = jax.tree.map(lambda x: x.reshape(rows, -1, *x.shape[1:]).swapaxes(0, 1), tree)
    out = jax.lax.map(function, split)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(count, *x.shape[2:]), out)


def batch_logprobs(
    model: Model, policy: Any, batch: Any, width: int, spec: SamplingSpec | None = None, rows: int = 32
) -> Float[Array, "*b {width}"]:
    """Log-probs of the response tokens of rows that were not sampled here, 0 past the end; R = `width`.

    `batch` has tokens [..., T], prompt_len and response_len [...], as `Preferences` and the algorithms' batches do. Without
    `spec` they are of the plain softmax, else of the policy that it describes. What a loss needs of a frozen reference is
    computed so once, before training. `rows` rows at a time, the last ones filled up.

    Raises:
        ValueError: a response is longer than `width`.
    """
    _check_width(batch, width)
    fields = (batch.tokens, batch.prompt_len, batch.response_len)
    return _batch_logprobs(model, spec, width, rows, policy, *fields)


def batch_choices(
    model: Model, policy: Any, batch: Any, width: int, rows: int = 32
) -> tuple[Float[Array, "*b {width}"], Bool[Array, "*b {width}"]]:
    """`batch_logprobs` of the plain softmax, and whether each token is its most probable one; 0 and False past the end.

    Raises:
        ValueError: a response is longer than `width`.
    """
    _check_width(batch, width)
    return _batch_choices(model, width, rows, policy, batch.tokens, batch.prompt_len, batch.response_len)


def _check_width(batch: Any, width: int) -> None:
    longest = int(jnp.max(batch.response_len))
    if longest > width:
        raise ValueError(f"a response has {longest} tokens, more than width={width}: its end would not count; widen it")


class _Rows(NamedTuple):
    tokens: jax.Array  # [B, T]
    prompt_len: jax.Array  # [B]
    response_len: jax.Array  # [B]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _batch_logprobs(model, spec, width, rows, policy, tokens, prompt_len, response_len):
    def score(part: _Rows) -> jax.Array:
        return _logprobs(model, policy, model.hidden(policy, part.tokens), part, width, spec)[0]

    return _by_filled_rows(score, _Rows(tokens, prompt_len, response_len), rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _batch_choices(model, width, rows, policy, tokens, prompt_len, response_len):
    def score(part: _Rows) -> tuple[jax.Array, jax.Array]:
        hidden = model.hidden(policy, part.tokens)
        best = heads.most_probable(model, policy, heads.response_hidden(hidden, part.prompt_len, width))
        chosen = best == heads.response_tokens(part.tokens, part.prompt_len, width)
        logprobs = _logprobs(model, policy, hidden, part, width, None)[0]
        return logprobs, chosen & masking.length_mask(part.response_len, width)

    return _by_filled_rows(score, _Rows(tokens, prompt_len, response_len), rows)


def _by_filled_rows(score: Callable[[_Rows], Any], batch: _Rows, rows: int) -> Any:
    """`score` of rows [..., T], `rows` at a time, the last ones filled up; [..., R]."""
    shape, count = batch.response_len.shape, batch.response_len.size
    rows = min(rows, count)
    flat = _Rows(batch.tokens.reshape(count, -1), batch.prompt_len.reshape(count), batch.response_len.reshape(count))
    filled = jax.tree.map(lambda x: jnp.pad(x, [(0, -count % rows)] + [(0, 0)] * (x.ndim - 1)), flat)
    return jax.tree.map(lambda x: x[:count].reshape(*shape, -1), _by_rows(score, filled, rows))
