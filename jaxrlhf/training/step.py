"""The jitted train step: whole-batch normalisation, accumulation, donation, and a guard against non-finite gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from jaxrlhf.core import offload, sharding
from jaxrlhf.core.types import Outputs, Term, TrainState
from jaxrlhf.models import int8
from jaxrlhf.training.objective import OutputsFn

LossFn = Callable[[Outputs, Any, Any], tuple[dict[str, Term], dict[str, Term]]]
Metrics = dict[str, jax.Array]
Seen = tuple[dict[str, Term], dict[str, Term]]  # loss terms, metrics
StepFn = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]


@struct.dataclass
class GuardedState:
    """An optimizer's state, and how many updates were left out because a gradient was not finite."""

    inner: Any
    skipped: jax.Array  # [] int32, in all
    in_a_row: jax.Array  # [] int32, the last ones


def init_state(params: Any, optimizer: optax.GradientTransformation, key: jax.Array, algorithm: Any = ()) -> TrainState:
    """The state before the first step, placed as `params` are: each optimizer moment is split as its parameter.

    Parameters are copied, because the step donates its state: the arrays passed in may serve on as a frozen reference.

    Raises:
        ValueError: a parameter is in eight bits, which nothing trains.
    """
    int8.refuse(params, "trained")
    # device_put commits: a call with uncommitted arrays would be another program than the calls that follow it.
    params = jax.tree.map(jnp.copy, params)
    params = jax.tree.map(lambda x: jax.device_put(x, x.sharding), params)
    placed = state_shardings(jax.eval_shape(optimizer.init, params), params)
    inner = jax.jit(optimizer.init, out_shardings=placed)(params)
    everywhere = _replicated(params)
    step, skipped, in_a_row = (jax.device_put(jnp.zeros([], jnp.int32), everywhere) for _ in range(3))
    guarded = GuardedState(inner, skipped, in_a_row)
    algorithm, key = jax.device_put((algorithm, key), everywhere)
    return TrainState(step=step, params=params, opt_state=guarded, algorithm=algorithm, key=key)


def owners(opt_state: Any, params: Any) -> list[tuple | None]:
    """For each leaf of an optimizer's state the path of the parameter that it is kept for, whose path ends its own; or None."""
    by_path = {tuple(map(str, path)): (path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def one(path, leaf):
        names = tuple(map(str, path))
        ends = (by_path.get(names[i:], (None, None)) for i in range(len(names)))
        return next((owner for owner, shape in ends if owner is not None and shape == leaf.shape), None)

    return [one(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)]


def state_shardings(opt_state: Any, params: Any) -> Any:
    """A sharding for each leaf of an optimizer's state: that of its parameter, else replicated."""
    placed = {path: leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    everywhere = _replicated(params)
    found = [everywhere if owner is None else placed[owner] for owner in owners(opt_state, params)]
    return jax.tree.unflatten(jax.tree.structure(opt_state), found)


def _replicated(params: Any) -> jax.sharding.Sharding:
    placed = jax.tree.leaves(params)[0].sharding
    return NamedSharding(placed.mesh, PartitionSpec()) if isinstance(placed, NamedSharding) else placed


def make_train_step(
    outputs_fn: OutputsFn, loss_fn: LossFn, config: Any, optimizer: optax.GradientTransformation, microbatches: int = 1
) -> StepFn:
    """A jitted (state, frozen, batch) -> (state, metrics): one optimizer update on the whole batch.

    Parameters and optimizer state of the state passed in are donated: use the returned one.

    Minimises the sum over the loss's terms of coefficient * SUM / COUNT, where SUM and COUNT are taken over all rows,
    however they are split into microbatches and over devices.
    """
    update = _make_update(outputs_fn, loss_fn, config, optimizer, microbatches)

    def train_step(params, opt_state, key, frozen, batch):
        params, opt_state, seen, report = update(params, opt_state, frozen, batch, key)
        return params, opt_state, _metrics(seen, report)

    return _jit(train_step)


def make_epochs(
    outputs_fn: OutputsFn,
    loss_fn: LossFn,
    config: Any,
    optimizer: optax.GradientTransformation,
    epochs: int,
    minibatches: int,
    microbatches: int = 1,
) -> StepFn:
    """A jitted (state, frozen, batch) -> (state, metrics) of epochs x minibatches updates in one scan; donates as above.

    Each epoch deals the rows into minibatches by a new permutation from fold_in(state.key, state.step). `state.step` counts
    calls; metrics are means over all updates (sums over sums of counts).
    """
    update = _make_update(outputs_fn, loss_fn, config, optimizer, microbatches)

    def train_epochs(params, opt_state, key, frozen, batch):
        rows = jax.tree.leaves(batch)[0].shape[0]
        _check_split(rows, minibatches, "minibatches")
        order_key, update_key = jax.random.split(key)
        orders = jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(order_key, epochs))

        def body(carry, xs):
            params, opt_state = carry
            index, i = xs
            part = jax.tree.map(lambda x: sharding.constrain(x[index], "batch", *[None] * (x.ndim - 1)), batch)
            params, opt_state, *out = update(params, opt_state, frozen, part, jax.random.fold_in(update_key, i))
            return (params, opt_state), out

        indices = orders.reshape(epochs * minibatches, rows // minibatches)
        xs = (indices, jnp.arange(epochs * minibatches))
        (params, opt_state), (seen, report) = jax.lax.scan(body, (params, opt_state), xs)
        report = {name: x.mean(0) if x.dtype == jnp.float32 else x[-1] for name, x in report.items()}
        return params, opt_state, _metrics(_pooled(seen), report)

    return _jit(train_epochs)


def update_ema(state: TrainState, decay: int | float) -> TrainState:
    """The state with ema = decay * ema + (1 - decay) * params; a state without an average starts one at its parameters.

    Raises:
        ValueError: decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay} of the average of parameters must be in [0, 1): 0 follows them, 1 would never move")
    if state.ema is None:
        return dataclasses.replace(state, ema=jax.tree.map(jnp.copy, state.params))
    return dataclasses.replace(state, ema=_average(state.ema, state.params, decay))


@functools.partial(jax.jit, donate_argnames="average")
def _average(average: Any, params: Any, decay: int | float | jax.Array) -> Any:
    return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, average, params)


def _jit(fn: Callable) -> StepFn:
    """A step from a pure (params, opt_state, key, frozen, batch) -> (params, opt_state, metrics): jitted, with donation.

    Left to itself the partitioner may choose other shardings for what comes out than for what went in: then donation fails
    and the second call compiles again. So those of the state are pinned. What a step does not change (key, algorithm, ema)
    stays outside, so that nobody who still holds it finds it deleted. `.lower(...)` and `.programs()` are for tests.
    """
    jitted: dict[Any, Any] = {}

    def of(state: TrainState) -> Any:
        placed = jax.tree.map(lambda x: x.sharding, (state.params, state.opt_state))
        key = tuple(jax.tree.leaves(placed))
        if key not in jitted:

            def train_step(params, opt_state, step, key, frozen, batch):
                params, opt_state, metrics = fn(params, opt_state, jax.random.fold_in(key, step), frozen, batch)
                return params, opt_state, step + 1, metrics

            out = (*placed, _replicated(state.params), None)
            jitted[key] = jax.jit(train_step, donate_argnames=("params", "opt_state"), out_shardings=out)
        return jitted[key]

    def call(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        args = (state.params, state.opt_state, state.step, state.key, frozen, batch)
        params, opt_state, step, metrics = of(state)(*args)
        return dataclasses.replace(state, params=params, opt_state=opt_state, step=step), metrics

    def lower(state: TrainState, frozen: Any, batch: Any) -> jax.stages.Lowered:
        return of(state).lower(state.params, state.opt_state, state.step, state.key, frozen, batch)

    call.lower = lower
    call.programs = lambda: sum(jit._cache_size() for jit in jitted.values())
    return call


def _make_update(outputs_fn: OutputsFn, loss_fn: LossFn, config: Any, optimizer, microbatches: int) -> Callable:
    """(params, opt_state, frozen, batch, key) -> (params, opt_state, terms and metrics summed over rows, report)."""

    def update(params, opt_state, frozen, batch, key):
        gradient, seen = _gradient(outputs_fn, loss_fn, config, microbatches, (params, frozen, batch, key))
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(_total(seen[0]))
        old_inner = offload.fetch(opt_state.inner, after=gradient)
        updates, inner = optimizer.update(gradient, old_inner, params)

        def keep(new, old):
            return jnp.where(finite, new, old)

        opt_state = GuardedState(
            inner=offload.leave(jax.tree.map(keep, inner, old_inner), opt_state.inner),
            skipped=opt_state.skipped + ~finite,
            in_a_row=jnp.where(finite, 0, opt_state.in_a_row + 1),
        )
        params = jax.tree.map(lambda p, u: keep(p + u.astype(p.dtype), p), params, updates)
        report = {
            "optimizer/grad_norm": norm,
            "optimizer/skipped": opt_state.skipped,
            "optimizer/skipped_in_a_row": opt_state.in_a_row,
        }
        return params, opt_state, seen, report

    return update


def _gradient(outputs_fn, loss_fn, config, microbatches: int, data: tuple) -> tuple[Any, Seen]:
    """The gradient of the whole-batch loss, and its terms and metrics summed over all rows; float32."""
    params, frozen, batch, key = data

    def part_loss(params, part, part_key, counts):
        """This part's share of the loss: its SUMs over the whole batch's COUNTs."""
        terms, metrics = loss_fn(outputs_fn(params, frozen, part, part_key), part, config)
        counts = {name: term.count for name, term in terms.items()} if counts is None else counts
        total = _total({name: term._replace(count=counts[name]) for name, term in terms.items()})
        return total, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (terms, metrics))

    grad = jax.value_and_grad(part_loss, has_aux=True)
    if microbatches == 1:
        (_, seen), gradient = grad(params, batch, key, None)
        return gradient, seen
    rows = jax.tree.leaves(batch)[0].shape[0]
    _check_split(rows, microbatches, "microbatches")
    # Microbatch m takes rows m, m + M, ...: every device gives its own share to each.
    parts = jax.tree.map(lambda x: _strided(x, microbatches), batch)
    counts = _counts(outputs_fn, loss_fn, config, (params, frozen, parts, key))

    def body(total, xs):
        part, i = xs
        (_, seen), gradient = grad(params, part, jax.random.fold_in(key, i), counts)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, gradient), seen

    zero = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    gradient, seen = jax.lax.scan(body, zero, (parts, jnp.arange(microbatches)))
    return gradient, _pooled(seen)


def _strided(x: jax.Array, parts: int) -> jax.Array:
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2))


def _counts(outputs_fn, loss_fn, config, data: tuple) -> dict[str, jax.Array]:
    """COUNT of each loss term over all microbatches. Counts depend on the batch only, so no model is run: its outputs are 0."""
    params, frozen, parts, key = data
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(outputs_fn, params, frozen, first, key)
    dummy = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def of_part(part):
        return {name: jnp.asarray(term.count, jnp.float32) for name, term in loss_fn(dummy, part, config)[0].items()}

    return jax.tree.map(lambda x: x.sum(0), jax.lax.map(of_part, parts))


def _pooled(seen: Seen) -> Seen:
    """Terms stacked over parts of a batch, as those of the whole."""
    return jax.tree.map(
        lambda t: Term(t.sum.sum(0), t.count.sum(0), t.coefficient[0]), seen, is_leaf=lambda x: isinstance(x, Term)
    )


def _mean(term: Term) -> jax.Array:
    # Where there is nothing to learn from, the sum is 0 too, and 0 / 0 would poison the rest.
    return term.sum / jnp.where(term.count > 0, term.count, 1.0)


def _total(terms: dict[str, Term]) -> jax.Array:
    return jnp.stack([term.coefficient * _mean(term) for term in terms.values()]).sum()


def _metrics(seen: Seen, report: Metrics) -> Metrics:
    terms, metrics = seen
    return {"loss/total": _total(terms), **{name: _mean(term) for name, term in (terms | metrics).items()}, **report}


def _check_split(rows: int, parts: int, name: str) -> None:
    if rows % parts:
        raise ValueError(f"a batch of {rows} rows cannot be split into {name}={parts} equal parts: choose a divisor of {rows}")
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    if rows // parts % ways:
        raise ValueError(
            f"{name}={parts} parts of {rows // parts} rows cannot be shared by data x fsdp = {ways} devices: "
            f"choose fewer parts, or a batch whose parts are a multiple of {ways}"
        )
