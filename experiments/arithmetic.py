"""The start of the arithmetic task: a small transformer from nothing, on demonstrations by people of whom most forget to carry.

    python -m experiments.arithmetic --out runs/arithmetic/start

It learns to do both, right and careless, and its most probable answer is mostly the careless one: 20 to 50 % of held-out sums
are right. Which of the two is wanted, only a reward says: python -m experiments.ppo --preset arithmetic
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import stage, tasks
from jaxrlhf.algorithms import lm
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import arithmetic, pipeline
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.data.tokenizer import BOS, EOS, Tokenizer
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import cli, objective, optimizer, step, timing
from jaxrlhf.training.flops import Pass
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run

MODEL = TransformerConfig(
    vocab_size=259, width=128, layers=2, heads=4, kv_heads=4, head_width=32, mlp_width=384, max_length=16
)  # the smallest vocabulary: a digit is a token


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path = Path("runs/arithmetic/start")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    model: TransformerConfig = MODEL
    steps: int = 600
    batch: int = 128  # demonstrations
    demonstrations: int = 100_000
    careless: float = 0.7  # share of the demonstrations that drop every carry
    optimizer: OptimizerConfig = OptimizerConfig(
        name="muon", learning_rate=0.01, adam_learning_rate=3e-3, weight_decay=0.01, clip_norm=1.0
    )
    sampling: stage.Sampling = tasks.ARITHMETIC
    held_out_prompts: int = 500
    watch: timing.Options = timing.Options()  # wait for each stage, profile steps, refuse to compile after warm-up


def run(config: Config) -> dict[str, Any]:
    """Train, and write `model/` and `result.json` into `config.out`."""
    mesh = stage.mesh(config.mesh, batch=config.batch, held_out_prompts=config.held_out_prompts)
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        pairs = arithmetic.demonstrations(config.demonstrations, config.careless, config.seed)
        tokenizer = tokenizers.train((prompt for prompt, _ in pairs), config.model.vocab_size)
        model_config = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
        model = transformer.build(model_config)
        data = pipeline.within(pipeline.batches(rows(pairs, tokenizer), config.batch, config.seed), model_config.vocab_size)
        data = stage.timed(run.clock, data)
        with jax.set_mesh(mesh):
            placed = sharding.shardings(transformer.param_specs(model_config), mesh)
            params = jax.jit(model.init, out_shardings=placed)(jax.random.key(config.seed))
            update = optimizer.make(config.optimizer, config.steps, params)
            state = run.restore(step.init_state(params, update, jax.random.key(config.seed + 1)))
            train_step = step.make_train_step(objective.make_outputs(model), lm.loss, lm.Config(), update)
            train_step = run.clock.learner(train_step, Pass(model_config, gradient=True))
            for i in run.steps(run.start, config.steps, "arithmetic", show=("loss/lm",)):
                row = data[i]
                width = row["tokens"].shape[1] - 1
                batch = lm.responses(row["tokens"], row["prompt_len"], row["response_len"], width)
                batch = sharding.shard_batch(batch, mesh)
                state, metrics = train_step(state, None, batch)
                run.log(i, metrics, batch)
                run.maybe_save(i, state)
            params = step.served(state)
            trained = stage.Trained(model_config, model, params, tokenizer, {})
            accuracy, answers = tasks.greedy(trained, params, config.sampling, config.held_out_prompts, mesh)
        stage.save(config.out / "model", "policy", params, model_config, tokenizer)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        pairs = zip(tasks.held_out_sums(config.held_out_prompts), answers, strict=True)
        careless = [answer == str(arithmetic.without_carry(row["left"], row["right"])) for row, answer in pairs]
        return run.done({"accuracy": accuracy, "careless": float(np.mean(careless)), "parameters": parameters})


def rows(pairs: list[tuple[str, str]], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Fine-tuning rows bos + problem + answer + eos: tokens [N, T], prompt_len [N], response_len [N]."""
    starts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
    ends = tokenizer.encode_batch([answer for _, answer in pairs], continuation=True)
    whole = [[BOS, *start, *end, EOS] for start, end in zip(starts, ends, strict=True)]
    tokens, length = pipeline.pad_rows(whole, max(map(len, whole)))
    prompt_len = np.fromiter((len(start) + 1 for start in starts), np.int32, len(starts))
    return {"tokens": tokens, "prompt_len": prompt_len, "response_len": length - prompt_len}


PRESETS = {
    "default": Config(),
    "smoke": Config(
        model=dataclasses.replace(MODEL, width=32, layers=1, heads=2, kv_heads=2, head_width=16, mlp_width=64),
        steps=60,
        batch=64,
        demonstrations=4_000,
        held_out_prompts=48,
    ),
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
