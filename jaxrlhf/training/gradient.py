"""The gradient of the whole-batch loss, and the update made of it: the same however the batch is split.

All pure: `training/step.py` and `training/by_length.py` compile them, `experiments/one_jit.py` composes them with sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxrlhf.core import offload, sharding
from jaxrlhf.core.types import Outputs, Term
from jaxrlhf.training.objective import OutputsFn
from jaxrlhf.training.optimizer import Moments

LossFn = Callable[[Outputs, Any, Any], tuple[dict[str, Term], dict[str, Term]]]
Metrics = dict[str, jax.Array]
Seen = tuple[dict[str, Term], dict[str, Term]]  # loss terms, metrics


@struct.dataclass
class GuardedState:
    """An optimizer's state, and how many updates were left out because a gradient was not finite."""

    inner: Any
    skipped: jax.Array  # [] int32, in all
    in_a_row: jax.Array  # [] int32, the last ones


def update_from(
    optimizer: optax.GradientTransformation, params: Any, opt_state: GuardedState, gradient: Any, seen: Seen
) -> tuple[Any, GuardedState, Metrics]:
    """Parameters and state after one update, both as they were where gradient or loss is not finite; and what to report."""
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(total(seen[0]))
    old_inner = offload.fetch(opt_state.inner, after=gradient)
    updates, inner = optax.with_extra_args_support(optimizer).update(gradient, old_inner, params, finite=finite)

    def keep(new, old):
        if isinstance(new, Moments):
            return new  # they have seen to it
        return jnp.where(finite, new, old)

    opt_state = GuardedState(
        inner=offload.leave(jax.tree.map(keep, inner, old_inner, is_leaf=lambda x: isinstance(x, Moments)), opt_state.inner),
        skipped=opt_state.skipped + ~finite,
        in_a_row=jnp.where(finite, 0, opt_state.in_a_row + 1),
    )
    params = jax.tree.map(lambda p, u: keep(p + u.astype(p.dtype), p), params, updates)
    report = {
        "optimizer/grad_norm": norm,
        "optimizer/skipped": opt_state.skipped,
        "optimizer/skipped_in_a_row": opt_state.in_a_row,
    }
    return params, opt_state, report


def of_part(outputs_fn: OutputsFn, loss_fn: LossFn, config: Any) -> Callable[..., tuple[Any, Seen]]:
    """(params, frozen, part, key, counts) -> the gradient of a part's share of the loss, its SUMs over the whole batch's
    COUNTs (None: the part is the whole), and its terms and metrics; float32."""

    def share(params, frozen, part, key, counts):
        terms, metrics = loss_fn(outputs_fn(params, frozen, part, key), part, config)
        counts = {name: term.count for name, term in terms.items()} if counts is None else counts
        loss = total({name: term._replace(count=counts[name]) for name, term in terms.items()})
        return loss, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (terms, metrics))

    return jax.grad(share, has_aux=True)


def of_batch(
    outputs_fn: OutputsFn, loss_fn: LossFn, config: Any, microbatches: int, data: tuple[Any, Any, Any, jax.Array]
) -> tuple[Any, Seen]:
    """The gradient of the whole-batch loss by `microbatches` equal parts, one after the other, and its terms and metrics
    summed over all rows; float32. `data`: params, frozen, batch, key.

    Raises:
        ValueError: the rows do not divide.
    """
    params, frozen, batch, key = data
    slope = of_part(outputs_fn, loss_fn, config)
    if microbatches == 1:
        return slope(params, frozen, batch, key, None)
    rows = jax.tree.leaves(batch)[0].shape[0]
    check_split(rows, microbatches, "microbatches")
    # Microbatch m takes rows m, m + M, ...: every device gives its own share to each.
    parts = jax.tree.map(lambda x: _strided(x, microbatches), batch)
    count_of = counts_of(outputs_fn, loss_fn, config, params, frozen, jax.tree.map(lambda x: x[0], parts), key)
    counts = jax.tree.map(lambda x: x.sum(0), jax.lax.map(count_of, parts))

    def body(sum_, xs):
        part, i = xs
        gradient, seen = slope(params, frozen, part, jax.random.fold_in(key, i), counts)
        return added(sum_, gradient), seen

    gradient, seen = jax.lax.scan(body, zeros(params), (parts, jnp.arange(microbatches)))
    return gradient, pooled(seen)


def zeros(params: Any) -> Any:
    """A gradient of nothing, float32 whatever the parameters are."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)


def added(sum_: Any, gradient: Any) -> Any:
    """Sums in float32."""
    return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), sum_, gradient)


def _strided(x: jax.Array, parts: int) -> jax.Array:
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2))


def counts_of(
    outputs_fn: OutputsFn, loss_fn: LossFn, config: Any, params: Any, frozen: Any, batch: Any, key: jax.Array
) -> Callable[[Any], dict[str, jax.Array]]:
    """COUNT of each loss term of batches shaped like `batch`. Counts depend on the batch only, so no model is run: its
    outputs are 0."""
    shapes = jax.eval_shape(outputs_fn, params, frozen, batch, key)
    dummy = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def count(part):
        return {name: jnp.asarray(term.count, jnp.float32) for name, term in loss_fn(dummy, part, config)[0].items()}

    return count


def pooled(seen: Seen) -> Seen:
    """Terms stacked over parts of a batch, as those of the whole."""
    return jax.tree.map(
        lambda t: Term(t.sum.sum(0), t.count.sum(0), t.coefficient[0]), seen, is_leaf=lambda x: isinstance(x, Term)
    )


def _mean(term: Term) -> jax.Array:
    # Where there is nothing to learn from, the sum is 0 too, and 0 / 0 would poison the rest.
    return term.sum / jnp.where(term.count > 0, term.count, 1.0)


def total(terms: dict[str, Term]) -> jax.Array:
    """The loss: the sum of coefficient * SUM / COUNT."""
    return jnp.stack([term.coefficient * _mean(term) for term in terms.values()]).sum()


def metrics_of(seen: Seen, report: Metrics) -> Metrics:
    """What a step says of itself: its loss, the means of terms and metrics, and the report of its update."""
    terms, metrics = seen
    return {"loss/total": total(terms), **{name: _mean(term) for name, term in (terms | metrics).items()}, **report}


def over_updates(seen: Seen, report: Metrics) -> Metrics:
    """The metrics of several updates, of which everything is stacked along the first axis."""
    report = {name: x.mean(0) if x.dtype == jnp.float32 else x[-1] for name, x in report.items()}
    return metrics_of(pooled(seen), report)


def padding(batch: Any) -> Metrics:
    """The share of the places of a batch of rows that hold real tokens; of a batch without lengths nothing."""
    if not hasattr(batch, "response_len") or not hasattr(batch, "tokens"):
        return {}
    real = jnp.minimum(batch.prompt_len + batch.response_len, batch.tokens.shape[-1]).sum()
    return {"train/padding_efficiency": real.astype(jnp.float32) / batch.tokens.size}


def check_split(rows: int, parts: int, name: str) -> None:
    """Refuse a batch that does not divide.

    Raises:
        ValueError: the rows are not a multiple of the parts, or a part not one of the devices that share it.
    """
    if rows % parts:
        raise ValueError(f"a batch of {rows} rows cannot be split into {name}={parts} equal parts: choose a divisor of {rows}")
    if rows // parts % (ways := sharding.ways()):
        raise ValueError(
            f"{name}={parts} parts of {rows // parts} rows cannot be shared by data x fsdp = {ways} devices: "
            f"choose fewer parts, or a batch whose parts are a multiple of {ways}"
        )
