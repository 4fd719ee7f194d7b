"""A policy on tasks of EleutherAI's lm-eval harness (extra `eval`; torch is not needed).

    python -m experiments.evaluate_harness --policy runs/demo/ppo/model --folder my_tasks --tasks my_task --out runs/harness

`folder` holds tasks as YAML files, whose data may be JSONL files beside them; without it the tasks are the harness's own, most
of which download their data. docs/harness.md has one in full.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from experiments import stage
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.evaluation import harness
from jaxrlhf.training import cli
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = ()  # by name
    policy: Path = Path("runs/demo/ppo/model")
    folder: Path | None = None  # of YAML files; None: the harness's own tasks
    out: Path = Path("runs/demo/harness")
    seed: int = 0  # of the examples shown, and of answers that are drawn
    mesh: MeshConfig = MeshConfig()
    frozen: stage.Weights = "float32"  # of the policy
    rows: int = 32  # read at a time
    shots: int | None = None  # examples shown before each question; None: as the task says
    limit: int | None = None  # questions of a task; None: all
    chat: bool = False  # questions as conversations, by the tokenizer's chat template


def run(config: Config) -> dict[str, Any]:
    """Write each task's figures, and how many contexts were too long, to `result.json` in `config.out`."""
    if not config.tasks:
        raise ValueError("tasks=(): name one or more tasks")
    if config.folder is not None and not config.folder.is_dir():
        raise FileNotFoundError(f"{config.folder}: no such folder of tasks")
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        mesh = sharding.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            policy = stage.load(config.policy, mesh, weights=config.frozen)
            judged = harness.Judged(policy.model, policy.params, policy.tokenizer, mesh, config.rows, config.chat, config.seed)
            language_model = harness.language_model(judged, str(config.policy.resolve()))
            result = evaluate(config, language_model)
        return run.done(result | {"contexts_cut": dict(judged.cut)})


def evaluate(config: Config, language_model: Any) -> dict[str, Any]:
    """What the harness says of the model: of each task its figures, how many questions it has, and its version.

    Raises:
        ValueError: a task that is not there.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = None if config.folder is None else str(config.folder)
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if unknown := set(config.tasks) - set(manager.all_tasks):
        near = ", ".join(manager.all_tasks[:20])
        raise ValueError(f"tasks {sorted(unknown)} are not known; {config.folder or 'the harness'} has {near}")
    judge: Any = lm_eval.simple_evaluate  # its decorator hides its parameters
    found = judge(
        language_model,
        tasks=list(config.tasks),
        num_fewshot=config.shots,
        limit=config.limit,
        apply_chat_template=config.chat,
        task_manager=manager,
        log_samples=False,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    return {name: found[name] for name in ("results", "n-samples", "n-shot", "versions")}


PRESETS = {"default": Config()}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
