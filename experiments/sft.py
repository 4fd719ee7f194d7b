"""Stage 2: fine-tune the language model on continuations of reviews and on replies in a chat.

    python -m experiments.sft --init runs/demo/pretrain/model --out runs/demo/sft

Its job at this size is to teach stopping and length, not a lower loss: more steps over-fit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import pretrain, stage
from jaxrlhf.algorithms import lm
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import chitchat, pipeline
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.training import cli, objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    init: Path = Path("runs/demo/pretrain/model")
    out: Path = Path("runs/demo/sft")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    steps: int = 50
    batch: int = 64  # rows
    review_share: float = 0.75  # of a batch; the rest are chat turns with their replies
    optimizer: OptimizerConfig = OptimizerConfig(
        name="muon", muon_dtype="bfloat16", learning_rate=0.002, adam_learning_rate=4e-4, warmup_fraction=0.1, clip_norm=None
    )


def run(config: Config) -> dict[str, Any]:
    """Train, and write `model/` and `result.json` into `config.out`."""
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        mesh = sharding.make_mesh(config.mesh)
        start = stage.load(config.init, mesh)
        replies, reviews, test = rows(start.tokenizer)
        held_out = {name: array[:512] for name, array in test.items()}
        share = (config.review_share, config.review_share)
        data = pipeline.mixed(replies, reviews, config.batch, config.seed, config.steps, share)
        batches = pipeline.by_step(lambda i: batch_of(data[i]))
        with jax.set_mesh(mesh):
            outputs = objective.make_outputs(start.model)
            before = loss(outputs, start.params, batch_of(held_out))
            params = train(run, config, start.params, outputs, batches, mesh)
            after = loss(outputs, params, batch_of(held_out))
        stage.save(config.out / "model", "policy", jax.device_get(params), start.config, start.tokenizer)
        return run.done({"nll_per_token": after, "nll_per_token_before": before})


def train(run: Run, config: Config, params: Any, outputs: objective.OutputsFn, batches: Any, mesh: jax.sharding.Mesh) -> Any:
    """`config.steps` updates of a language model on `batches[step]` (`lm.Batch`), from where `run` left off."""
    update = optimizer.make(config.optimizer, config.steps, params)
    state = run.restore(step.init_state(params, update, jax.random.key(config.seed)))
    train_step = step.make_train_step(outputs, lm.loss, lm.Config(), update)
    for i in run.steps(run.start, config.steps, "sft", show=("loss/lm",)):
        state, metrics = train_step(state, None, sharding.shard_batch(batches[i], mesh))
        run.log(i, metrics)
        run.maybe_save(i, state)
    return state.params


def rows(tokenizer: Tokenizer) -> tuple[dict[str, np.ndarray], ...]:
    """Chat replies and review continuations to learn from, and held-out continuations."""
    turns, replies = zip(*chitchat.pairs()[:20_000], strict=True)
    encoded = [tokenizer.encode_batch([pipeline.clean(text) for text in side]) for side in (turns, replies)]
    chat = pipeline.reply_rows(list(zip(*encoded, strict=True)), prompt_width=12, response_width=24)
    train, test = (pipeline.continuation_rows(tokenizer.encode_batch(pretrain.texts(split))) for split in ("train", "test"))
    return chat, train, test


def batch_of(rows: dict[str, np.ndarray]) -> lm.Batch:
    """Rows as the loss wants them; the response may be as wide as the row."""
    return lm.responses(rows["tokens"], rows["prompt_len"], rows["response_len"], rows["tokens"].shape[1] - 1)


def loss(outputs: objective.OutputsFn, params: Any, batch: lm.Batch) -> float:
    """Nats per response token of held-out rows."""
    term = jax.jit(lambda p: lm.loss(outputs(p, None, batch, None), batch, lm.Config())[0]["loss/lm"])(params)
    return float(term.sum / term.count)


PRESETS = {"default": Config(), "smoke": Config(steps=20, batch=16)}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
