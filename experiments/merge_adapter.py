"""A trained adapter laid into its base: the peft package's format in, a model for every later stage out.

python -m experiments.merge_adapter --base runs/demo/pretrain/model --adapter runs/demo/sft/adapter --out runs/merged
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from experiments import stage
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.models import lora, peft
from jaxrlhf.training import cli
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    base: Path = Path("runs/demo/pretrain/model")
    adapter: Path = Path("runs/demo/sft/adapter")  # adapter_config.json and adapter_model.safetensors
    out: Path = Path("runs/demo/merged")
    mesh: MeshConfig = MeshConfig()


def run(config: Config) -> dict[str, Any]:
    """Write `model/` and `result.json` into `config.out`."""
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        mesh = sharding.make_mesh(config.mesh)
        start = stage.load(config.base, mesh)
        adapter, settings = peft.load(config.adapter, start.config)
        adapter = jax.device_put(adapter, sharding.shardings(lora.specs(start.config, settings), mesh))
        merged = jax.device_get(lora.merge(start.params, adapter, settings))
        stage.save(config.out / "model", "policy", merged, start.config, start.tokenizer)
        return run.done({"rank": settings.rank, "scale": settings.scale, "targets": list(settings.targets or ())})


if __name__ == "__main__":
    cli.main(run, Config)
