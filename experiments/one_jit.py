"""PPO with a whole iteration as one program, for small models: sample, score, advantages, epochs; and many runs side by side.

    python -m experiments.one_jit --seeds 1 2 3 4 --learning-rates 3e-4 7e-4 --kl-coefs 0.01 0.05
    python -m experiments.one_jit --seeds 1    # what experiments/ppo.py --preset arithmetic trains, in one program

The same pure functions that experiments/ppo.py compiles stage by stage, composed under one `jit`: nothing waits for the host
between them. `vmap` over it trains a run for each seed, learning rate and KL coefficient at once: a small model leaves a
machine mostly idle, so that eight runs take far less than eight times as long. The price: shapes cannot follow the data, so
every response takes all steps, and the reward must be mathematics: a reward model, or a rule on tokens (here: sums).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments import critics, stage, tasks
from experiments import ppo as stagewise
from jaxrlhf.algorithms import ppo
from jaxrlhf.core import masking, sharding
from jaxrlhf.core.types import Prompts, Rollout, TrainState
from jaxrlhf.data import arithmetic
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.models import heads, roles
from jaxrlhf.sampling import decode, rollout
from jaxrlhf.sampling.rows import Shape
from jaxrlhf.training import cli, objective, optimizer, step
from jaxrlhf.training.run import Run

Reward = Callable[[Any, Rollout, Prompts], Float[Array, " b"]]  # (parameters or None, rollout, prompts) -> scores
Iteration = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Config:
    ppo: stagewise.Config = stagewise.ARITHMETIC  # its `out`, `seed` and `mesh` are not read
    out: Path = Path("runs/arithmetic/one_jit")
    seeds: tuple[int, ...] = (1, 2, 3, 4)
    learning_rates: tuple[float, ...] = ()  # none: ppo.optimizer's
    kl_coefs: tuple[float, ...] = ()  # none: ppo.algorithm's

    def __post_init__(self):
        if not self.seeds:
            raise ValueError("seeds is empty: give at least one, say --seeds 1")
        for name in ("learning_rates", "kl_coefs"):
            if any(not value > 0 for value in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must all be > 0")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One of the runs that are trained side by side."""

    seed: int
    learning_rate: float
    kl_coef: float


def settings(config: Config) -> list[Setting]:
    """Every seed with every learning rate and every KL coefficient."""
    rates = config.learning_rates or (config.ppo.optimizer.learning_rate,)
    coefficients = config.kl_coefs or (config.ppo.algorithm.kl_coef,)
    return [Setting(*each) for each in itertools.product(config.seeds, rates, coefficients)]


def run(config: Config) -> dict[str, Any]:
    """Train every setting, and write `result.json` with what each reached, and each policy as `0/model/`, `1/model/`, ..., into
    `config.out`."""
    check(config.ppo)
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        mesh = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
        with jax.set_mesh(mesh):
            return train(run, config, mesh)


def check(config: stagewise.Config) -> None:
    """Refuse what one program cannot do.

    Raises:
        ValueError: naming the setting.
    """
    wrong = {
        "algorithm.text_coef": config.algorithm.text_coef > 0,
        "ema_decay": config.ema_decay is not None,
        "microbatches.tokens": config.microbatches.tokens > 0,
        "rollouts.generation.slots": config.rollouts.generation.slots > 0,
        "rollouts.stragglers": config.rollouts.stragglers > 0,
        "optimizer.name='schedule_free'": config.optimizer.name == "schedule_free",
    }
    if named := [name for name, is_set in wrong.items() if is_set]:
        raise ValueError(
            f"one_jit: {', '.join(named)} needs the host or another state: leave it out, or use experiments/ppo.py"
        )


def train(run: Run, config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """All settings at once."""
    base = config.ppo
    with contextlib.ExitStack() as opened:
        made = {seed: tasks.make(dataclasses.replace(base, seed=seed), mesh, base.frozen) for seed in config.seeds}
        return train_all(run, config, {seed: opened.enter_context(task) for seed, task in made.items()}, mesh)


def train_all(run: Run, config: Config, tasks_of: dict[int, tasks.Task], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """All settings at once, on the tasks of their seeds."""
    every, base, task = settings(config), config.ppo, tasks_of[config.seeds[0]]
    reward, reward_params = jittable_reward(base, task.start, mesh)
    frozen = {"reference": task.start.params, "reward": reward_params}
    states, update = initial(base, every, task.start, mesh)
    step_of = compiled(iteration(base, task, update, reward), len(every))
    rates = jnp.asarray([each.learning_rate / base.optimizer.learning_rate for each in every])
    keys = jnp.stack([jax.random.split(jax.random.key(each.seed))[1] for each in every])
    states, curve = run.restore(states), []
    for i in run.steps(run.start, base.iterations, "one jit", show=("reward/score", "policy/kl_ref")):
        prompts = [tasks_of[each.seed].prompts[i] for each in every]
        prompts = jax.tree.map(lambda *xs: np.stack(xs), *prompts)
        states, metrics = step_of(states, frozen, prompts, keys, i, rates)
        run.log(i, {name: x.max() if "skipped" in name else x.mean() for name, x in metrics.items()})  # over the settings
        curve.append(metrics["reward/score"])
        run.maybe_save(i, states)
    run.maybe_save(base.iterations - 1, states, last=True)
    rows = []
    for n, each in enumerate(every):
        params = jax.tree.map(lambda x, n=n: x[n], states.params)
        held_out = task.judge(roles.attach(task.start.params, params, base.lora)["policy"])[0]
        stage.save_policy(config.out / str(n), task.start, params["policy"], base.lora, base.policy)
        rows.append(dataclasses.asdict(each) | held_out | {"reward": [float(values[n]) for values in curve]})
        print(", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items() if isinstance(value, int | float)))
    return run.done({"settings": rows})


def initial(
    config: stagewise.Config, every: Sequence[Setting], start: stage.Trained, mesh: jax.sharding.Mesh
) -> tuple[TrainState, Any]:
    """The states of all settings, stacked, each as experiments/ppo.py begins; and their optimizer."""
    states, update, algorithm = [], None, config.algorithm
    for each in every:
        own = dataclasses.replace(config, seed=each.seed)
        trained = {"policy": stage.trainable(start, own.lora, mesh, own.seed, own.init)}
        params = trained | critics.value_function(own.critic, start, own.lora, own.reward, mesh, own.seed)
        if update is None:
            count = config.iterations * algorithm.epochs * algorithm.minibatches
            update = optimizer.make(config.optimizer, count, params)
        key = jax.random.split(jax.random.key(each.seed))[0]
        kept = ppo.init(dataclasses.replace(algorithm, kl_coef=each.kl_coef))
        states.append(step.init_state(params, update, key, kept))
    return jax.tree.map(lambda *xs: jnp.stack(xs), *states), update


def iteration(config: stagewise.Config, task: tasks.Task, update: Any, reward: Reward) -> Iteration:
    """A pure (state, frozen, prompts, key, number, rate) -> (state, metrics): one iteration of experiments/ppo.py.

    `key` is that of all answers of the run; `rate` times the learning rate.
    """
    start, algorithm, spec = task.start, config.algorithm, task.spec
    exact = algorithm.kl_estimator == "exact"
    in_loss = exact and algorithm.kl_in == "loss"
    outputs = objective.make_outputs(
        start.model, spec, entropy=True, values=True, ref_kl=in_loss, trunk="policy", adapters=config.lora
    )
    shape = Shape(1, spec.max_tokens, config.rollouts.generation.cache)
    options = dataclasses.replace(config.rollouts, exact_kl=exact)

    def one(state, frozen, prompts, key, number, rate):
        # What is frozen is an argument, not a constant of the program; the adapters' base is the reference.
        current = roles.attach(frozen["reference"], state.params, config.lora)
        drawn = decode.whole(start.model, spec, shape, current["policy"], prompts, jax.random.fold_in(key, number), number)
        experience = rollout.experience(start.model, current, frozen, drawn, spec, options)
        score = reward(frozen["reward"], drawn, prompts)
        usable = jnp.isfinite(score)
        weight = usable.astype(jnp.float32)
        experience = dataclasses.replace(experience, score=jnp.where(usable, score, 0.0), weight=weight)
        batch, kept, stats = ppo.prepare(experience, state.algorithm, algorithm)
        epochs = step.epochs_of(
            outputs,
            ppo.loss,
            algorithm,
            optimizer.times(update, rate),
            algorithm.epochs,
            algorithm.minibatches,
            config.microbatches.parts,
        )
        own = jax.random.fold_in(state.key, state.step)
        params, opt_state, metrics = epochs(state.params, state.opt_state, own, frozen, batch)
        state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, algorithm=kept)
        return state, rollout.stats(experience) | stats | metrics

    return one


def compiled(one: Iteration, count: int) -> Iteration:
    """The iteration of `count` runs as one program: (states, frozen, prompts, keys, number, rates) -> (states, metrics), where
    all but `frozen` and `number` have an axis of runs. The states passed in are donated."""
    if count > 1:
        return jax.jit(jax.vmap(one, in_axes=(0, None, 0, 0, None, 0)), donate_argnums=0)

    def alone(states, frozen, prompts, keys, number, rates):
        # Without the axis: a product of one matrix is another program than that of a stack of one.
        state, prompts, key, rate = jax.tree.map(lambda x: x[0], (states, prompts, keys, rates))
        return jax.tree.map(lambda x: x[None], one(state, frozen, prompts, key, number, rate))

    return jax.jit(alone, donate_argnums=0)


def jittable_reward(config: stagewise.Config, start: stage.Trained, mesh: jax.sharding.Mesh) -> tuple[Reward, Any]:
    """The task's reward as mathematics, and its parameters."""
    if config.task == "arithmetic":
        return sums_reward(start.tokenizer, arithmetic.problems("train")), None
    judged = stage.load_reward(config.reward, mesh, start)
    value = stage.reward(judged)
    return lambda params, drawn, prompts: value(params, drawn), judged.params


def sums_reward(tokenizer: Tokenizer, rows: Sequence[dict[str, Any]]) -> Reward:
    """1 for the right answer and 0.1 for an answer of digits alone, read from tokens: what `tasks.arithmetic` gives by
    `functions.exact_match` and `functions.format_match`, for all texts whose spaces and digits are ASCII's.

    Raises:
        ValueError: a token of the tokenizer is more than one byte.
    """
    pieces = tokenizer.pieces()
    if longest := [piece for piece in pieces if len(piece) > 1]:
        raise ValueError(f"a token stands for {longest[0]!r}: sums are compared byte by byte; use the start of arithmetic.py")
    byte_of = np.array([piece[0] if piece else -1 for piece in pieces], np.int32)
    answers = [np.frombuffer(row["answer"].encode(), np.uint8).astype(np.int32) for row in rows]
    most = max(map(len, answers))
    table = np.stack([np.pad(answer, (0, most - len(answer)), constant_values=-1) for answer in answers])
    sizes = np.array([len(answer) for answer in answers], np.int32)

    def reward(params: Any, drawn: Rollout, prompts: Prompts) -> Float[Array, " b"]:
        del params
        width = drawn.logprobs.shape[1]
        byte = jnp.asarray(byte_of)[heads.response_tokens(drawn.tokens, drawn.prompt_len, width)]
        written = masking.length_mask(drawn.response_len, width) & (byte >= 0)  # EOS is no byte
        place = jnp.arange(width)
        blank = (byte == 32) | ((byte >= 9) & (byte <= 13)) | ((byte >= 28) & (byte <= 31))
        first = jnp.cumprod((blank & written).astype(jnp.int32), axis=1).sum(axis=1)
        last = jnp.where(written & ~blank, place + 1, 0).max(axis=1)
        own = jnp.asarray(table)[prompts.row]
        found = jnp.take_along_axis(byte, jnp.clip(first[:, None] + jnp.arange(most), 0, width - 1), axis=1)
        same = jnp.where(own >= 0, found == own, True).all(axis=1)
        right = same & (jnp.maximum(last - first, 0) == jnp.asarray(sizes)[prompts.row])
        # A tokenizer that puts a space before the first word takes one away again.
        dropped = jnp.logical_and(tokenizer.prefixed, byte[:, 0] == 32)[:, None] & (place == 0)
        counted = written & ~dropped
        digits = jnp.where(counted, (byte >= 48) & (byte <= 57), True).all(axis=1) & counted.any(axis=1)
        return right + jnp.float32(0.1) * digits

    return reward


PRESETS = {
    "default": Config(),
    "smoke": Config(
        ppo=dataclasses.replace(stagewise.ARITHMETIC, iterations=4, batch=32, held_out_prompts=48),
        seeds=(1, 2),
    ),
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
