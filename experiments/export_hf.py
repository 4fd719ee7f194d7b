"""A model folder as a Hugging Face checkpoint: `AutoModelForCausalLM` loads it, or `AutoModelForSequenceClassification`.

    python -m experiments.export_hf --model runs/demo/policy --out runs/demo/policy_hf
    python -m experiments.export_hf --model runs/demo/reward_model/model --out runs/demo/reward_hf

The checkpoint is read back and compared before the script ends. With `--compare` it also keeps `ours.npz`, tokens with our
logits or scores, for `tests/golden/make_hf.py check`, which runs transformers itself.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from experiments import import_hf, stage
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.models import hf
from jaxrlhf.training import cli


@dataclasses.dataclass(frozen=True)
class Config:
    model: Path = Path("runs/demo/policy")  # of a finished stage
    out: Path = Path("runs/demo/policy_hf")
    file_bytes: int = 5 * 10**9  # of a file; a larger model is written in several
    compare: bool = False  # keep ours.npz
    mesh: MeshConfig = MeshConfig()


def run(config: Config) -> dict[str, Any]:
    """Write the checkpoint, read it back, and say by how much its logits or scores differ.

    Raises:
        ValueError: the model is one that transformers cannot hold.
    """
    mesh = sharding.make_mesh(config.mesh)
    kind = stage.kind(config.model)
    if kind == "reward_adapter":
        raise ValueError(f"{config.model}: an adapter without its base: export the `model` folder beside it, which has both")
    model = stage.load(config.model, mesh, kind)
    if kind == "reward_model":
        if stage.ensembled(model.settings) is not None:
            raise ValueError(f"{config.model}: an ensemble is not a model of transformers: export a single reward model")
        if model.settings["pooling"] != "last":
            raise ValueError(
                f"{config.model}: its score is read from the {model.settings['pooling']} of all states, but a classifier of "
                "transformers reads the last: train it with --pooling last"
            )
    values = hf.save(config.out, model.params, model.config, model.tokenizer, config.file_bytes)
    rows = tokens(model)
    ours = import_hf.outputs(kind, model.params, model.config, rows)
    again = import_hf.outputs(kind, *hf.load(config.out, mesh), rows)
    difference = float(np.abs(ours - again).max())
    print(
        f"parity: greatest difference {difference:.2e} after reading it back, largest number {np.abs(ours).max():.3g}",
        flush=True,
    )
    if config.compare:
        np.savez(config.out / "ours.npz", tokens=rows, outputs=ours)
    architecture = values["architectures"][0]
    return {"kind": kind, "architecture": architecture, "parameters": import_hf.size(model.params), "difference": difference}


def tokens(model: stage.Trained, rows: int = 2, width: int = 24) -> np.ndarray:
    """Random ids [rows, width] without pad, at which a classifier would stop reading."""
    shape = (rows, min(width, model.config.max_length))
    drawn = np.random.default_rng(0).integers(0, model.config.vocab_size - 1, shape)
    return drawn + (drawn >= model.tokenizer.pad)


PRESETS = {"default": Config()}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
