"""What the functions that scripts share read of a script's settings. A `Config` has these fields and need not name this."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from experiments import best, stage
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.rewards import pool
from jaxrlhf.sampling import rollout
from jaxrlhf.training.by_length import Microbatches


class Settings(Protocol):
    """What the configuration of a script says of its task."""

    @property
    def out(self) -> Path:
        """Where the run is kept."""
        ...

    @property
    def mesh(self) -> MeshConfig:
        """The devices that share its arrays."""
        ...

    @property
    def task(self) -> str:
        """Which task."""
        ...

    @property
    def policy(self) -> Path:
        """Where the policy starts."""
        ...

    @property
    def reward(self) -> Path:
        """The reward model; arithmetic reads none."""
        ...

    @property
    def sampling(self) -> stage.Sampling:
        """How answers are drawn."""
        ...

    @property
    def batch(self) -> int:
        """Prompts an iteration."""
        ...

    @property
    def seed(self) -> int:
        """Of the order of the prompts."""
        ...

    @property
    def microbatches(self) -> Microbatches:
        """Parts of the rows of an update."""
        ...

    @property
    def held_out_prompts(self) -> int:
        """How many prompts the policy is judged on."""
        ...

    @property
    def pool(self) -> pool.Config:
        """Child processes for reward functions, and functions of the user's own."""
        ...

    @property
    def lora(self) -> LoraConfig:
        """The adapter that is trained, if one is."""
        ...


class Online(Settings, Protocol):
    """What the configuration of a script says besides where answers are drawn at each iteration."""

    @property
    def iterations(self) -> int:
        """Batches of answers."""
        ...

    @property
    def rollouts(self) -> rollout.Options:
        """How they are drawn."""
        ...

    @property
    def algorithm(self) -> Any:
        """The algorithm's own."""
        ...

    @property
    def evaluate_every(self) -> int:
        """Iterations from one judgement to the next."""
        ...

    @property
    def keep(self) -> best.Keep:
        """Which weights are written as the policy."""
        ...
