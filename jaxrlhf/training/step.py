"""The jitted train step: whole-batch normalisation, accumulation, donation, and a guard against non-finite gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import NamedSharding, PartitionSpec

from jaxrlhf.core import offload, sharding
from jaxrlhf.core.types import TrainState
from jaxrlhf.models import int8
from jaxrlhf.training import by_length, gradient
from jaxrlhf.training.by_length import Microbatches
from jaxrlhf.training.gradient import GuardedState, LossFn, Metrics
from jaxrlhf.training.objective import OutputsFn

StepFn = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]
Split = int | Microbatches  # of the rows of an update: so many equal parts, or as `by_length.Microbatches` says


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
    known = {tuple(map(str, path)): path for path, _ in jax.tree_util.tree_leaves_with_path(params)}

    def one(path):
        names = tuple(map(str, path))
        return next((known[names[i:]] for i in range(len(names)) if names[i:] in known), None)

    return [one(path) for path, _ in jax.tree_util.tree_leaves_with_path(opt_state)]


def state_shardings(opt_state: Any, params: Any) -> Any:
    """A sharding for each leaf of an optimizer's state: as its parameter is split (`moment_sharding`), else replicated."""
    leaves, known = jax.tree.leaves(opt_state), dict(jax.tree_util.tree_leaves_with_path(params))
    everywhere = _replicated(params)
    found = [
        everywhere if owner is None else moment_sharding(leaf, known[owner]) or everywhere
        for owner, leaf in zip(owners(opt_state, params), leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(opt_state), found)


def moment_sharding(moment: Any, param: Any) -> jax.sharding.Sharding | None:
    """Of a moment of a parameter: its own; of a factored one, which is a mean over one axis, that of the axes that are left.

    None: of another shape, a placeholder say; it is small, and stands whole on every device.
    """
    place = param.sharding
    if moment.shape == param.shape:
        return place
    # Of a square matrix either axis may be the one missing; both are split evenly, so that only who sends to whom differs.
    missing = [i for i in range(param.ndim) if param.shape[:i] + param.shape[i + 1 :] == moment.shape]
    if not missing or not isinstance(place, NamedSharding):
        return None
    spec = [*place.spec, *[None] * (param.ndim - len(place.spec))]
    del spec[missing[-1]]
    return NamedSharding(place.mesh, PartitionSpec(*spec))


def _replicated(params: Any) -> jax.sharding.Sharding:
    placed = jax.tree.leaves(params)[0].sharding
    return NamedSharding(placed.mesh, PartitionSpec()) if isinstance(placed, NamedSharding) else placed


def make_train_step(
    outputs_fn: OutputsFn,
    loss_fn: LossFn,
    config: Any,
    optimizer: optax.GradientTransformation,
    microbatches: Split = 1,
) -> StepFn:
    """A jitted (state, frozen, batch) -> (state, metrics): one optimizer update on the whole batch.

    Parameters and optimizer state of the state passed in are donated: use the returned one.

    Minimises the sum over the loss's terms of coefficient * SUM / COUNT, where SUM and COUNT are taken over all rows,
    however they are split into microbatches and over devices.
    """
    split = _split(microbatches)
    if split.tokens:
        return _by_length(outputs_fn, loss_fn, config, optimizer, split)

    def train_step(params, opt_state, key, frozen, batch):
        found, seen = gradient.of_batch(outputs_fn, loss_fn, config, split.parts, (params, frozen, batch, key))
        params, opt_state, report = gradient.update_from(optimizer, params, opt_state, found, seen)
        return params, opt_state, gradient.metrics_of(seen, report | gradient.padding(batch))

    return _jit(train_step)


def make_epochs(
    outputs_fn: OutputsFn,
    loss_fn: LossFn,
    config: Any,
    optimizer: optax.GradientTransformation,
    epochs: int,
    minibatches: int,
    microbatches: Split = 1,
) -> StepFn:
    """A jitted (state, frozen, batch) -> (state, metrics) of epochs x minibatches updates in one scan; donates as above.

    Each epoch deals the rows into minibatches by a new permutation from fold_in(state.key, state.step). `state.step` counts
    calls; metrics are means over all updates (sums over sums of counts). Microbatches sorted by length are programs of their
    own, dispatched one after the other, in place of the scan; the minibatches are the same.
    """
    split = _split(microbatches)
    if split.tokens:
        return _by_length(outputs_fn, loss_fn, config, optimizer, split, (epochs, minibatches))
    return _jit(epochs_of(outputs_fn, loss_fn, config, optimizer, epochs, minibatches, split.parts))


def epochs_of(
    outputs_fn: OutputsFn,
    loss_fn: LossFn,
    config: Any,
    optimizer: optax.GradientTransformation,
    epochs: int,
    minibatches: int,
    microbatches: int = 1,
) -> Callable[..., tuple[Any, Any, Metrics]]:
    """What `make_epochs` compiles, a pure (params, opt_state, key, frozen, batch) -> (params, opt_state, metrics), for programs
    that compose it with more; `key` is fold_in(state.key, state.step)."""

    def train_epochs(params, opt_state, key, frozen, batch):
        rows = jax.tree.leaves(batch)[0].shape[0]
        gradient.check_split(rows, minibatches, "minibatches")
        indices, update_key = _dealt(key, rows, epochs, minibatches)

        def body(carry, xs):
            params, opt_state = carry
            index, i = xs
            part = jax.tree.map(lambda x: sharding.constrain(x[index], "batch", *[None] * (x.ndim - 1)), batch)
            data = (params, frozen, part, jax.random.fold_in(update_key, i))
            found, seen = gradient.of_batch(outputs_fn, loss_fn, config, microbatches, data)
            params, opt_state, report = gradient.update_from(optimizer, params, opt_state, found, seen)
            return (params, opt_state), (seen, report)

        xs = (indices, jnp.arange(epochs * minibatches))
        (params, opt_state), (seen, report) = jax.lax.scan(body, (params, opt_state), xs)
        return params, opt_state, gradient.over_updates(seen, report) | gradient.padding(batch)

    return train_epochs


def _dealt(key: jax.Array, rows: int, epochs: int, minibatches: int) -> tuple[jax.Array, jax.Array]:
    """Rows [epochs * minibatches, rows of a minibatch], each once an epoch; and the key of the updates."""
    order_key, update_key = jax.random.split(key)
    orders = jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(order_key, epochs))
    return orders.reshape(epochs * minibatches, rows // minibatches), update_key


def _split(microbatches: Split) -> Microbatches:
    return microbatches if isinstance(microbatches, Microbatches) else Microbatches(microbatches)


def _by_length(
    outputs_fn: OutputsFn,
    loss_fn: LossFn,
    config: Any,
    optimizer: optax.GradientTransformation,
    split: Microbatches,
    times: tuple[int, int] | None = None,
) -> StepFn:
    """A step whose host loop adds parts of rows sorted by length: one update, or epochs x minibatches of them."""
    compiled: dict[Any, by_length.Programs] = {}
    fold = jax.jit(jax.random.fold_in)
    dealt = jax.jit(_dealt, static_argnums=(1, 2, 3))

    def steps(key: jax.Array, rows: int):
        if times is None:
            yield np.arange(rows, dtype=np.int32), key
            return
        gradient.check_split(rows, times[1], "minibatches")
        indices, update_key = dealt(key, rows, *times)
        for i, index in enumerate(np.asarray(indices)):
            yield index, fold(update_key, i)

    def call(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        placed = jax.tree.map(lambda x: x.sharding, (state.params, state.opt_state))
        same = tuple(jax.tree.leaves(placed))
        if same not in compiled:
            compiled[same] = by_length.programs(outputs_fn, loss_fn, config, optimizer, placed)
        every = steps(fold(state.key, state.step), jax.tree.leaves(batch)[0].shape[0])
        params, opt_state, metrics = by_length.run(compiled[same], split, state, frozen, batch, every)
        return dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1), metrics

    call.programs = lambda: sum(each.compiled() for each in compiled.values())
    return call


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


def served(state: TrainState) -> Any:
    """The parameters that are judged, saved and served: the running average where there is one (`update_ema`), else what the
    optimizer says, else those that train.

    Schedule-free AdamW takes its gradients at y, which is what `state.params` hold, and promises its loss at the average x.
    Rollouts are drawn from y: PPO's ratio compares the policy that learns with the one that sampled, which at the first update
    must be the same. Source: Defazio et al. 2024 (arXiv 2405.15682), equations 3 to 5: x = (y - (1 - b1) z) / b1.
    """
    if state.ema is not None:
        return state.ema
    kind = optax.contrib.ScheduleFreeState
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, kind))
    found = next((x for x in leaves if isinstance(x, kind)), None)
    return state.params if found is None else _averaged(state.params, found.z, found.b1)


@jax.jit
def _averaged(params: Any, z: Any, b1: jax.Array) -> Any:
    z, b1 = offload.fetch((z, b1))
    b1 = b1.reshape(-1)[0]  # of an ensemble one a member, all alike
    return jax.tree.map(lambda y, z: (y - (1.0 - b1) * z) / b1, params, z)


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
