"""Answers drawn on devices of their own while the others learn: two disjoint meshes of one job (`--rollouts.apart.devices`).

While the update of iteration i runs, the answers of i + 1 are drawn in a thread, with the weights that were pushed last: every
k iterations (`rollouts.apart.steps`), before their update. So answers are of weights 1 to k iterations old, never older, which
importance weights correct (`algorithms/offpolicy.py`). With k = 0 weights are pushed at each iteration and nothing overlaps:
the run that draws and learns in turns, in the same numbers.

Which weights draw which answers follows from the iteration alone, not from what took how long. The pushed weights are a part of
the state of the run; answers under way are not, since a run that goes on draws them again from those weights.

Source: Noukhovitch et al. 2024, arXiv 2410.18252 (one iteration off policy); Espeholt et al. 2018 (IMPALA), weights of actors.
"""

from __future__ import annotations

import concurrent.futures
import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import struct

from experiments.settings import Online
from jaxrlhf.core import sharding, types
from jaxrlhf.core.types import Prompts, Rollout
from jaxrlhf.models import lora, roles, transformer
from jaxrlhf.sampling import generate
from jaxrlhf.training import plan, timing

if TYPE_CHECKING:  # which begins with this module's `learning`
    from experiments.tasks import Task

Chunks = list[tuple[int, int]]


@struct.dataclass
class Pushed:
    """Weights on the devices that draw."""

    policy: Any  # or its adapter
    version: types.Array  # [] int32, the iteration before whose update they were pushed


class Sampler:
    """The devices that draw, and the answers that they have under way. Made by `sampler`."""

    def __init__(self, config: Online, task: Task, n: int, mesh: jax.sharding.Mesh, clock: timing.Clock):
        self.figures: dict[str, float] = {}  # of the answers given last
        self.mesh, self.steps = mesh, config.rollouts.apart.steps
        self._config, self._task, self._n, self._clock = config, task, n, clock
        start = task.start
        # Where nothing but an adapter is pushed, what it lies over is here from the start.
        self._base = moved(start.params, mesh) if config.lora.rank else None
        whole = sharding.shardings(transformer.param_specs(start.config), mesh)
        self._places = sharding.shardings(lora.specs(start.config, config.lora), mesh) if config.lora.rank else whole
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "answers", lambda: clock.programs.name_thread("rollout"))
        self._under_way: dict[int, concurrent.futures.Future] = {}

    def push(self, params: Any, iteration: int) -> Pushed:
        """The policy of {"policy": ...} and what else is trained, or a policy alone, on its way to the devices that draw."""
        version = jax.device_put(np.int32(iteration), sharding.replicated(self.mesh))
        return Pushed(jax.device_put(params.get("policy", params), self._places), version)

    def tell_memory(self, pushed: Pushed) -> None:
        """Print what drawing a batch holds on these devices.

        Raises:
            ValueError: more than one of them has.
        """
        generation, task, config = self._config.rollouts.generation, self._task, self._config
        rows, samples = config.batch, self._n
        if 0 < generation.slots < rows * samples:
            rows, samples = generation.slots, 1
        with jax.set_mesh(self.mesh):
            width = task.prompts[0].tokens.shape[1]
            found = plan.sampling(
                task.start.model, self._policy(pushed.policy), task.spec, (rows, width), samples, generation.cache
            )
        held = plan.Row("policy", "weights pushed", "always", plan.size((self._base, pushed)))
        most = plan.limit(list(self.mesh.local_devices))
        print(f"\nDevices that only draw:\n{plan.table((held, *found), most)}\n", flush=True)
        plan.check((held, *found), most)

    def answers(self, params: Any, iteration: int, pushed: Pushed | None) -> tuple[Rollout, Prompts, Chunks, Pushed | None]:
        """Answers to the prompts of this iteration, both where they were drawn; (rows, steps) of every chunk; and what the next
        iteration's are drawn with, which is begun.

        `params` are those of this iteration, before its update; `pushed` what was given by the iteration before, or with k = 0
        None.

        Raises:
            ValueError: weights more than k iterations old.
        """
        if not self.steps:
            pushed, self._under_way = self.push(params, iteration), {}
        assert pushed is not None
        age = iteration - int(pushed.version)
        if not 0 <= age <= self.steps:
            raise ValueError(f"iteration {iteration} was given weights {age} iterations old, rollouts.apart.steps={self.steps}")
        if iteration not in self._under_way:
            self._begin(iteration, pushed)
        drawn, prompts, chunks = self._under_way.pop(iteration).result()
        self.figures = {"rollout/staleness": float(age)}
        if not self.steps:
            return drawn, prompts, chunks, None
        if iteration % self.steps == 0 and age:
            pushed = self.push(params, iteration)
        if iteration + 1 < self._config.iterations:
            self._begin(iteration + 1, pushed)
        return drawn, prompts, chunks, pushed

    def _begin(self, iteration: int, pushed: Pushed) -> None:
        prompts = self._task.prompts[iteration]  # here: the clock that times their making is of this thread
        self._under_way[iteration] = self._thread.submit(self._draw, prompts, iteration, pushed)

    def _draw(self, prompts: Prompts, iteration: int, pushed: Pushed) -> tuple[Rollout, Prompts, Chunks]:
        with jax.set_mesh(self.mesh):
            key = jax.random.fold_in(jax.random.split(jax.random.key(self._config.seed))[1], iteration)
            there, policy = sharding.shard_batch(prompts, self.mesh), self._policy(pushed.policy)
            start, options = self._task.start, self._config.rollouts.generation
            version = int(pushed.version)
            answers, chunks = generate.traced(start.model, policy, there, self._task.spec, key, self._n, version, options)
            return jax.block_until_ready(answers), there, chunks

    def _policy(self, pushed: Any) -> Any:
        return roles.attach(self._base, {"policy": pushed}, self._config.lora)["policy"]


def moved(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Arrays on another mesh, split over its axes of the same names; an axis that these do not divide is whole."""

    def one(x: jax.Array) -> jax.Array:
        spec: Any = x.sharding
        names = (*spec.spec, *[None] * x.ndim)[: x.ndim]
        ways = [math.prod(mesh.shape[own] for own in jax.tree.leaves(name)) for name in names]
        kept = [None if size % part else name for size, part, name in zip(x.shape, ways, names, strict=True)]
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*kept)))

    return jax.tree.map(one, tree)


def drawing(config: Online) -> jax.sharding.Mesh:
    """The mesh of the devices that only draw.

    Raises:
        ValueError: it does not fit them, or does not divide the prompts of a batch.
    """
    mesh = sharding.make_mesh(config.rollouts.apart.mesh, jax.devices()[-config.rollouts.apart.devices :])
    sharding.check_rows(mesh, {"batch": config.batch})
    return mesh


def learning(config: Any) -> list[Any]:
    """The devices that learn: all but those that only draw.

    Raises:
        ValueError: there are no more than those; or the settings cannot go together.
    """
    devices, options = jax.devices(), getattr(config, "rollouts", None)
    if options is None or not options.apart.devices:
        return devices
    apart = options.apart
    if apart.devices >= len(devices):
        raise ValueError(
            f"rollouts.apart.devices={apart.devices} of {len(devices)} device(s) leaves none to learn: choose at most "
            f"{len(devices) - 1}"
        )
    if jax.process_count() > 1:
        raise ValueError("rollouts.apart.devices in a job of several processes: draw apart within one, or set it to 0")
    if options.stragglers or config.watch.strict:
        raise ValueError("rollouts.apart.devices goes with neither rollouts.stragglers nor watch.strict: set one of them off")
    if apart.steps and options.reuse_sampler_logprobs:
        raise ValueError(
            "rollouts.reuse_sampler_logprobs with rollouts.apart.steps > 0: log-probs of weights that are older are not the "
            "learner's; set one of them off"
        )
    if apart.steps and getattr(config.algorithm, "importance", None) is None:
        raise ValueError(
            f"rollouts.apart.steps={apart.steps}: answers of older weights need importance weights, algorithm.importance "
            "(algorithm.importance:config at the end of a command; ppo, grpo, rloo and reinforce have them); or set steps to 0"
        )
    drawing(config)
    return devices[: len(devices) - apart.devices]


def sampler(config: Online, task: Task, n: int, clock: timing.Clock) -> Sampler | None:
    """The devices that only draw n answers to each prompt; None where all do both.

    Raises:
        ValueError: their mesh does not divide the weights.
    """
    return Sampler(config, task, n, drawing(config), clock) if config.rollouts.apart.devices else None
