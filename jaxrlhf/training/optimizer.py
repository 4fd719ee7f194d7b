"""Optimizers and learning-rate schedules, on optax. Imports neither jax nor optax until one is made, for a quick `--help`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import jax
    import optax


class Moments(NamedTuple):
    """Adam's state, which stays as it is where the update is told that the gradient is not `finite`."""

    count: Any  # [] int32, updates done
    mu: Any  # of gradients
    nu: Any  # of their squares


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, Lion, Adafactor, schedule-free AdamW, or Muon for the matrices of the layers beside Adam for everything else."""

    name: Literal["adamw", "muon", "lion", "adafactor", "schedule_free"] = "adamw"
    # Of everything, under muon of the weight matrices. Lion wants a third to a tenth of AdamW's; Adafactor's is relative to the
    # size of each weight (1e-2 to 1e-3); schedule-free AdamW's may be larger than AdamW's.
    learning_rate: float = 3e-4
    adam_learning_rate: float = 4e-3  # under muon: embeddings, norms, biases and heads
    head_scale: float = 1.0  # learning rate of the trees `value` and `head` (scalar heads), times this
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # schedule_free has none: constant
    warmup_fraction: float = 0.05  # of all steps, rising linearly
    final_fraction: float = 0.05  # of the learning rate, at the last step
    weight_decay: float = 0.0  # on weight matrices alone
    clip_norm: float | None = 1.0  # of the whole gradient; None: no clipping
    b1: float = 0.9  # under schedule_free the share of the average in the point where gradients are taken
    b2: float = 0.95  # lion's authors take 0.99
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # in which moments are kept; all is computed in float32
    epsilon: float = 1e-8
    epsilon_style: Literal["corrected", "tensorflow"] = "corrected"  # tensorflow: outside Adam's bias correction
    momentum: float = 0.95  # muon's
    muon_dtype: Literal["float32", "bfloat16"] = "float32"  # operands of its products; Jordan et al. take bfloat16

    def __post_init__(self):
        for name in ("learning_rate", "adam_learning_rate", "epsilon"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"optimizer {name}={getattr(self, name)} must be > 0 and finite")
        for name in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer {name}={getattr(self, name)} must be in [0, 1]")
        for name in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer {name}={getattr(self, name)} must be in [0, 1)")
        if self.name == "schedule_free" and not (self.b1 > 0 and self.schedule == "constant"):
            raise ValueError(
                f"optimizer schedule='{self.schedule}', b1={self.b1}: schedule_free averages in place of a schedule, so set "
                "schedule='constant', and b1 > 0, the share of the average where gradients are taken"
            )
        if self.moment_dtype == "bfloat16" and (self.name == "adafactor" or (self.b2 > 0.98 and self.name != "lion")):
            raise ValueError(
                f"optimizer moment_dtype='bfloat16' with name='{self.name}', b2={self.b2}: bfloat16 has 8 bits, so a moment "
                "that changes by less than 1/256 at a time stands still; set b2 <= 0.98, or float32 (adafactor's are small)"
            )
        for name in ("weight_decay", "head_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer {name}={getattr(self, name)} must be >= 0")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optimizer clip_norm={self.clip_norm} must be > 0; None turns clipping off")


def schedule(config: OptimizerConfig, total_steps: int, peak: int | float) -> Callable[[Any], jax.Array]:
    """(number of updates done) -> learning rate of the next one.

    The first step has 1/warmup of the peak (not 0, which would waste it); the last has `final_fraction` of it.
    """
    import jax.numpy as jnp

    warmup = max(1, round(config.warmup_fraction * total_steps))
    decay = max(1, total_steps - warmup)

    def rate(count):
        rise = jnp.minimum((count + 1) / warmup, 1.0)
        done = jnp.clip((count + 1 - warmup) / decay, 0.0, 1.0)
        if config.schedule == "constant":
            left = 1.0
        elif config.schedule == "linear":
            left = 1.0 - done
        else:
            left = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        return peak * rise * (config.final_fraction + (1.0 - config.final_fraction) * left)

    return rate


def make(config: OptimizerConfig, total_steps: int, params: Any) -> optax.GradientTransformation:
    """The optimizer for `params`, whose leaves' names and ranks decide who updates them. `total_steps`: optimizer updates.

    Under schedule_free the parameters that train are not those to judge and save: `step.served`.

    Source: Muon: Jordan et al. 2024 (kellerjordan.github.io/posts/muon): Nesterov momentum, five Newton-Schulz steps, each
    layer of a stacked weight by itself, times sqrt(max(1, out / in)); as `optax.contrib.muon` where `muon_dtype` is float32.
    AdamW: Loshchilov and Hutter 2019, with the decay times the learning rate, as in all of them. Lion: Chen et al. 2023
    (arXiv 2302.06675), program 1. Adafactor: Shazeer and Stern 2018 (arXiv 1804.04235), algorithm 4, each matrix by itself.
    Schedule-free AdamW: Defazio et al. 2024 (arXiv 2405.15682), algorithm 1. Moments in bfloat16: DeepSeek-AI 2024
    (arXiv 2412.19437), section 3.3.3.

    Raises:
        ValueError: no steps, or muon without a weight matrix to use it on.
    """
    import optax
    import optax.contrib

    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps} must be >= 1: the schedule is spread over them")
    labels = label(params, config.name)
    used = set(_leaves(labels))
    if config.name == "muon" and "muon" not in used:
        raise ValueError(
            "optimizer name='muon' found no weight matrix [L, in, out] under a key 'layers': use name='adamw' for this model"
        )
    peak = config.adam_learning_rate if config.name == "muon" else config.learning_rate

    def own(decay: float, scale: float = 1.0) -> optax.GradientTransformation:
        rate = schedule(config, total_steps, peak * scale)
        direction = _direction(config)
        return optax.chain(direction, optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate))

    # head_scale 0 would freeze a head: then the rate is 0, which a schedule can say as well as any other.
    parts = {"matrix": own(config.weight_decay), "plain": own(0.0), "head": own(0.0, config.head_scale)}
    if config.name == "muon":
        parts["muon"] = _muon(config, schedule(config, total_steps, config.learning_rate))
    if config.name == "adafactor":
        # A stack as one would share its clipping and its size among layers.
        parts |= {"stacked matrix": of_members(parts["matrix"]), "stacked plain": of_members(parts["plain"])}
        parts["stacked experts"] = of_members(parts["stacked matrix"])
    update = optax.partition({name: part for name, part in parts.items() if name in used}, labels)
    if config.name == "schedule_free":
        update = _schedule_free(config, update, schedule(config, total_steps, peak))
    return update if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """What is stepped along, before decay and learning rate."""
    import optax

    if config.name == "adafactor":
        # Algorithm 4 has d = 1, epsilon 1e-30 and 1e-3; it factors every matrix, optax those of at least 128 a side.
        factored = optax.scale_by_factored_rms()
        return optax.chain(factored, optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms(1e-3))
    if config.name == "lion":
        return _narrow(config, optax.scale_by_lion(config.b1, config.b2))
    b1 = 0.0 if config.name == "schedule_free" else config.b1  # which averages parameters in place of gradients
    if not b1 and config.epsilon_style == "corrected":
        return _narrow(config, optax.scale_by_rms(config.b2, config.epsilon, eps_in_sqrt=False, bias_correction=True))
    return _narrow(config, _adam(config, b1))


def _narrow(config: OptimizerConfig, update: optax.GradientTransformation) -> optax.GradientTransformation:
    """With the moments of matrices kept in `moment_dtype`, and computed in float32."""
    import jax
    import jax.numpy as jnp
    import optax

    if config.moment_dtype == "float32":
        return update

    def cast(state, old, new):
        return jax.tree.map(lambda x: x.astype(new) if x.dtype == old and x.ndim > 1 else x, state)

    def init(params):
        return cast(update.init(params), jnp.float32, jnp.bfloat16)

    whole = optax.with_extra_args_support(update)

    def advance(updates, state, params=None, *, finite=True, **others):
        del others
        updates, state = whole.update(updates, cast(state, jnp.bfloat16, jnp.float32), params, finite=finite)
        return updates, cast(state, jnp.float32, jnp.bfloat16)

    return optax.GradientTransformationExtraArgs(init, advance)


def _schedule_free(
    config: OptimizerConfig, update: optax.GradientTransformation, rate: Callable
) -> optax.GradientTransformation:
    """Updates that move z, where parameters are y = (1 - b1) z + b1 x and x is the average of all z, weighted by the squared
    learning rate, Adam's bias correction included."""
    import jax.numpy as jnp
    import optax.contrib

    def weight(count):  # optax counts from 1
        return rate(count - 1) * jnp.sqrt(1.0 - config.b2**count)

    return optax.contrib.schedule_free(update, weight, config.b1)


def of_members(update: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer of an ensemble whose parameters are stacked [M, ...]: each member's as if it trained alone.

    `update` is made for one member's parameters.
    """
    import optax

    from jaxrlhf.core import members

    whole = optax.with_extra_args_support(update)

    def advance(updates, state, params=None, *, finite=True, **others):
        del others
        return members.each(functools.partial(whole.update, finite=finite), updates, state, params)

    return optax.GradientTransformationExtraArgs(lambda params: members.each(update.init, params), advance)


def times(update: optax.GradientTransformation, factor: Any) -> optax.GradientTransformation:
    """The optimizer with its learning rate times `factor`, which may be traced: under vmap each run has its own.

    Not under schedule_free, whose updates are differences of averages.
    """
    import jax
    import optax

    whole = optax.with_extra_args_support(update)

    def advance(updates, state, params=None, *, finite=True, **others):
        del others
        updates, state = whole.update(updates, state, params, finite=finite)
        return jax.tree.map(lambda u: factor * u, updates), state

    return optax.GradientTransformationExtraArgs(update.init, advance)


def label(params: Any, name: str = "adamw") -> Any:
    """For each leaf who updates it: `muon`, `matrix` (with decay), `plain` (without), `head` (without, times head_scale); under
    adafactor also `stacked ...`, leaf by layer."""
    import jax

    from jaxrlhf.core.sharding import path_name

    def one(path, leaf):
        names = path_name(path).split("/")
        if (names[0] in ("value", "head") or names[:2] == ["critic", "head"]) and leaf.ndim < 2:
            return "head"
        stacked = "layers" in names[:-1]
        matrix = leaf.ndim - stacked >= 2
        if name == "muon":
            return "muon" if stacked and matrix else "plain"
        if name == "adafactor" and stacked:
            return "stacked experts" if leaf.ndim > 3 else "stacked matrix" if matrix else "stacked plain"
        return "matrix" if matrix else "plain"

    return jax.tree_util.tree_map_with_path(one, params)


def _adam(config: OptimizerConfig, b1: float) -> optax.GradientTransformation:
    """Adam's direction: corrected, m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + epsilon), as `optax.scale_by_adam`; or tensorflow,
    sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon), whose first steps are smaller.

    It is read from the moments that are kept. Were they to be kept or not after it, XLA would compute it from the old ones once
    more, so that none could be written in its place: a CPU copied them all, twice the parameters, at every update.

    Source: Kingma and Ba 2015, algorithm 1; the other in section 2, the order "for more efficiency" with epsilon-hat, as
    TensorFlow 1's Adam and openai/lm-human-preferences have it.
    """
    import jax
    import jax.numpy as jnp
    import optax

    b2, epsilon = config.b2, config.epsilon

    def init(params):
        return Moments(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(updates, state, params=None, *, finite=True, **others):
        del params, others
        count = jnp.where(finite, optax.safe_increment(state.count), state.count)
        first, second = 1 - b1**count, 1 - b2**count
        mu = jax.tree.map(lambda g, m: jnp.where(finite, (1 - b1) * g + b1 * m, m), updates, state.mu)
        nu = jax.tree.map(lambda g, v: jnp.where(finite, (1 - b2) * g**2 + b2 * v, v), updates, state.nu)

        def corrected(m, v):
            return m / first / (jnp.sqrt(v / second) + epsilon)

        def tensorflow(m, v):
            return jnp.sqrt(second) / first * m / (jnp.sqrt(v) + epsilon)

        direction = corrected if config.epsilon_style == "corrected" else tensorflow
        return jax.tree.map(direction, mu, nu), Moments(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _leaves(tree: Any) -> list:
    import jax

    return jax.tree.leaves(tree)


def _muon(config: OptimizerConfig, rate: Callable) -> optax.GradientTransformation:
    import jax
    import jax.numpy as jnp
    import optax
    from optax import contrib

    def dimensions(params):  # [L, in, out]: one matrix a layer; [L, X, in, out]: one an expert
        return jax.tree.map(lambda p: contrib.MuonDimensionNumbers(p.ndim - 2, p.ndim - 1), params)

    def by_shape(updates):
        return jax.tree.map(lambda u: u * jnp.sqrt(max(1.0, u.shape[-1] / u.shape[-2])), updates)

    def orthogonal(updates):
        return jax.tree.map(lambda u: orthogonalise(u.reshape(-1, *u.shape[-2:])).reshape(u.shape), updates)

    if config.muon_dtype == "float32":
        direction = contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=dimensions)
    else:  # the scale of a momentum does not matter to its direction, so a plain trace does
        direction = optax.chain(
            optax.trace(config.momentum, nesterov=True), optax.stateless(lambda updates, _: orthogonal(updates))
        )
    return optax.chain(
        _narrow(config, direction),
        optax.stateless(lambda updates, _: by_shape(updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def orthogonalise(stack: jax.Array) -> jax.Array:
    """Of each matrix of a stack [L, in, out] the nearest with orthonormal rows or columns, roughly: five quintic
    Newton-Schulz steps with bfloat16 products and float32 sums.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon, `zeropower_via_newtonschulz5`.
    """
    import jax
    import jax.numpy as jnp

    from jaxrlhf.models import products

    a, b, c = 3.4445, -4.7750, 2.0315
    tall = stack.shape[1] > stack.shape[2]

    def product(x, y, axis):  # of y's axis: contracting the last of both needs no transpose, which a CPU would write out
        narrow = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
        return jax.lax.dot_general(*narrow, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)

    def one(x):
        x = products.transpose(x) if tall else x  # a plain x.T takes a CPU three times as long in all that follows
        x = x / (jnp.linalg.norm(x) + 1e-8)
        for _ in range(5):
            square = product(x, x, 1)
            x = a * x + product(b * square + c * product(square, square, 0), x, 0)
        return products.transpose(x) if tall else x

    # A CPU runs products of two matrices narrow, but not those of stacks.
    return jax.lax.map(one, stack) if jax.default_backend() == "cpu" else jax.vmap(one)(stack)
