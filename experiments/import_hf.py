"""A Hugging Face checkpoint, or a GGUF file, as a model folder that every stage here starts from.

    python -m experiments.import_hf --checkpoint downloads/SmolLM2-135M --out runs/smollm2/model
    python -m experiments.import_hf --checkpoint downloads/SmolLM2-135M-Instruct.Q4_1.gguf --out runs/smollm2/model
    python -m experiments.sft --init runs/smollm2/model --out runs/smollm2/sft

Language models, and sequence classifiers with one label as reward models. Nothing is downloaded: the folder holds config.json,
safetensors and the tokenizer, a GGUF file (extra `gguf`) all of these. With `--golden`, what transformers computes is compared:
`tests/golden/make_hf.py of` writes it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments import stage
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import gguf_tokenizer
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.models import gguf, heads, hf, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import cli


@dataclasses.dataclass(frozen=True)
class Config:
    checkpoint: Path = Path("checkpoint")  # folder with config.json, or a .gguf file
    out: Path = Path("runs/imported/model")
    dtype: Literal["float32", "bfloat16"] = "float32"  # operands of weight products; the weights are kept in float32
    max_length: int | None = None  # shorter rows than the checkpoint allows; None: as it says
    golden: Path | None = None  # .npz with `tokens` [B, T] and `logits` [B, T, V] or `scores` [B] of transformers
    tolerance: float = 2e-4  # of the greatest difference, in parts of the largest golden number above 1
    mesh: MeshConfig = MeshConfig()


def run(config: Config) -> dict[str, Any]:
    """Read the checkpoint, compare it where there is a golden, and write the model folder.

    Raises:
        ValueError: the checkpoint is not supported, or differs from the golden by more than the tolerance.
    """
    mesh = sharding.make_mesh(config.mesh)
    kind, architecture, tokenizer, params, shape = read(config.checkpoint, mesh)
    hf.check_vocabulary(tokenizer, shape)
    result: dict[str, Any] = {"kind": kind, "model_type": architecture, "parameters": size(params)}
    if config.golden is not None:
        result |= compare(config, kind, params, shape)
        print(f"parity: greatest difference {result['difference']:.2e}, largest number {result['largest']:.3g}", flush=True)
    shape = dataclasses.replace(shape, dtype=config.dtype, max_length=config.max_length or shape.max_length)
    if "positions" in (trunk := params if kind == "policy" else params["trunk"]):
        trunk["positions"] = trunk["positions"][: shape.max_length]
    notes = {"source": str(config.checkpoint)} | ({} if kind == "policy" else {"pooling": "last"})
    stage.save(config.out, kind, jax.device_get(params), shape, tokenizer, **notes)
    return result


def read(checkpoint: Path, mesh: jax.sharding.Mesh) -> tuple[str, str, Tokenizer, Any, TransformerConfig]:
    """Kind, architecture, tokenizer, parameters on the mesh and configuration of a folder or a GGUF file."""
    if checkpoint.suffix == gguf.SUFFIX:
        file = gguf.open_file(checkpoint)
        tokenizer = gguf_tokenizer.from_metadata(file.metadata, checkpoint)  # first, for it may be refused and takes a second
        return "policy", file.metadata["general.architecture"], tokenizer, *gguf.load(file, mesh)
    values = hf.read_config(checkpoint)
    kind = "reward_model" if hf.is_reward_model(values) else "policy"
    return kind, values["model_type"], tokenizers.load(checkpoint), *hf.load(checkpoint, mesh)


def size(params: Any) -> int:
    """How many numbers the parameters are."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def compare(config: Config, kind: str, params: Any, shape: TransformerConfig) -> dict[str, float]:
    """The greatest difference between our logits, or scores, and the golden ones."""
    with np.load(config.golden or "") as file:
        golden = dict(file)
    ours = outputs(kind, params, shape, golden["tokens"])
    what = "logits" if kind == "policy" else "scores"
    theirs = golden[what]
    difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    if not difference <= config.tolerance * max(1.0, largest):
        raise ValueError(
            f"{config.checkpoint}: our {what} differ from {config.golden} by {difference:.2e} of {largest:.3g}, "
            f"more than tolerance={config.tolerance}: is the golden that of this checkpoint?"
        )
    return {"difference": difference, "largest": largest}


def outputs(kind: str, params: Any, shape: TransformerConfig, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of a policy or scores [B] of a reward model, float32 throughout."""
    model = transformer.build(dataclasses.replace(shape, dtype="float32"))

    @jax.jit
    def run(params, tokens):
        if kind == "policy":
            return model.logits(params, model.hidden(params, tokens))
        length = jax.numpy.full(tokens.shape[0], tokens.shape[1])
        score = heads.score(params["head"], model.hidden(params["trunk"], tokens), length)
        return params["gain"] * score + params["bias"]

    with jax.default_matmul_precision("highest"):
        return np.asarray(run(params, tokens.astype(np.int32)))


PRESETS = {"default": Config()}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
