"""The whole loop, on real human judgements: from nothing to a policy that people's choices trained, and one round more.

    python -m experiments.rlhf --out runs/demo                     # nine to eleven minutes on two cores
    python -m experiments.rlhf --out runs/demo --labeler human     # you choose between the answers of the second round
    python -m experiments.rlhf --out runs/demo --control --overoptimize

Every stage is a script of its own beside this one, in a folder of its own under `--out`. A stage that is done is not done
again; interrupted anywhere, the same command goes on. At the end `report.html` is worth opening, and `policy/` holds the
policy alone: python -m experiments.chat --policy runs/demo/policy
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from experiments import evaluate, label, ppo, pretrain, reward_model, sample_pairs, sft, stage
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.evaluation import report
from jaxrlhf.sampling import generate, rollout
from jaxrlhf.training import cli
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run

REFRESH = reward_model.Config(
    steps=100,
    texts=48,
    width=44,  # an answer has at most 37
    optimizer=OptimizerConfig(
        name="muon",
        muon_dtype="bfloat16",
        learning_rate=0.002,
        adam_learning_rate=4e-4,
        head_scale=2.0,
        warmup_fraction=0.1,
        clip_norm=None,
    ),
)
# For a model this small a program takes longer to compile than all that fewer rows would save.
PPO = dataclasses.replace(ppo.Config(), rollouts=rollout.Options(generation=generate.Options(halvings=1)))
# A refreshed reward model scores more steeply: a higher price keeps the policy about as near as in the first round.
AGAIN = dataclasses.replace(PPO, algorithm=dataclasses.replace(ppo.Config().algorithm, kl_coef=0.15))
# What few kinds of text taught is exploited soonest: the words that films are praised with are not those of other judges.
NARROW = reward_model.Config(domains=("movie",), steps=200)
OVEROPTIMIZE = dataclasses.replace(
    PPO,
    iterations=60,
    algorithm=dataclasses.replace(ppo.Config().algorithm, kl_coef=0.0),
    optimizer=dataclasses.replace(ppo.Config().optimizer, learning_rate=1e-3),
    sampling=stage.Sampling(min_tokens=0),
)


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path = Path("runs/demo")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    labeler: Literal["simulated", "human"] = "simulated"  # who chooses between the policy's answers
    control: bool = False  # also a second round with ratings only, to see what the choices are worth
    overoptimize: bool = False  # also PPO without the KL penalty, to see reward models exploited
    pretrain: pretrain.Config = pretrain.Config()
    sft: sft.Config = sft.Config()
    reward_model: reward_model.Config = reward_model.Config()
    ppo: ppo.Config = PPO
    evaluate: evaluate.Config = evaluate.Config()
    sample_pairs: sample_pairs.Config = sample_pairs.Config()
    label: label.Config = label.Config()
    refresh: reward_model.Config = REFRESH  # the second round: from the first reward model, on ratings and choices
    ppo_again: ppo.Config = AGAIN
    narrow: reward_model.Config = NARROW  # a second reward model to exploit, of ratings of movies alone
    overoptimization: ppo.Config = OVEROPTIMIZE


def run(config: Config) -> dict[str, Any]:
    """Run every stage that is not done, and write the report."""
    every = tuple(field.name for field in dataclasses.fields(config))
    with Run.open(config.out, config, tensorboard=False, free=every) as run:  # each stage checks its own settings
        steps = plan(config)
        for number, (name, fn, settings) in enumerate(steps, 1):
            print(f"[{number:2}/{len(steps)}] {name:<20}", end="", flush=True)
            with printing_to(config.out / "printed" / f"{name}.txt") if fn is not label.run else contextlib.nullcontext():
                result = fn(dataclasses.replace(settings, out=config.out / name, seed=config.seed))
            print(f" {result['seconds']:6.1f} s", flush=True)
        export(config.out / "ppo_2" / "model", config.out / "policy")
        report.write(config.out)
        print(f"open {config.out / 'report.html'}; talk to it: python -m experiments.chat --policy {config.out / 'policy'}")
        return run.done({"stages": [name for name, _, _ in steps]})


@contextlib.contextmanager
def printing_to(file: Path) -> Iterator[None]:
    """What a stage prints (the memory it will hold, what it found in a model) goes to a file, not between the lines here."""
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as out, contextlib.redirect_stdout(out):
        yield


def plan(config: Config) -> list[tuple[str, Callable[[Any], dict[str, Any]], Any]]:
    """(folder, stage, settings) in order; each reads what an earlier one wrote."""
    c, mesh, folder = config, {"mesh": config.mesh}, lambda name: config.out / name / "model"
    start, feedback = folder("sft"), {"store": config.out / "feedback.sqlite"}
    trunk = {"init": folder("pretrain"), "reference": start} | mesh
    again = {"refresh": folder("reward_model")} | trunk
    name = "you" if c.labeler == "human" else c.label.name

    def tuned(suffix: str) -> list:
        reward, policy = {"reward": folder("reward_model" + suffix)} | mesh, folder("ppo" + suffix)
        judged = dataclasses.replace(c.evaluate, baseline=start, candidate=policy, **reward)
        return [
            ("ppo" + suffix, ppo.run, dataclasses.replace(c.ppo_again if suffix else c.ppo, policy=start, **reward)),
            ("evaluate" + suffix, evaluate.run, judged if not suffix else dataclasses.replace(judged, best_of=())),
        ]

    steps = [
        ("pretrain", pretrain.run, dataclasses.replace(c.pretrain, **mesh)),
        ("sft", sft.run, dataclasses.replace(c.sft, init=folder("pretrain"), **mesh)),
        ("reward_model", reward_model.run, dataclasses.replace(c.reward_model, **trunk)),
        *tuned(""),
        (
            "sample_pairs",
            sample_pairs.run,
            dataclasses.replace(c.sample_pairs, policies=(folder("ppo"), start), **feedback, **mesh),
        ),
        (
            "label",
            label.run,
            dataclasses.replace(c.label, labeler=c.labeler, name=name, least=2 * c.refresh.pairs * (name == "you"), **feedback),
        ),
        ("reward_model_2", reward_model.run, dataclasses.replace(c.refresh, choices=feedback["store"], **again)),
        *tuned("_2"),
    ]
    if c.control:
        steps += [
            ("reward_model_control", reward_model.run, dataclasses.replace(c.refresh, **again)),
            *tuned("_control"),
        ]
    if c.overoptimize:
        free = dataclasses.replace(c.overoptimization, policy=start, **mesh)
        steps += [
            ("overoptimize", ppo.run, dataclasses.replace(free, reward=folder("reward_model"))),
            ("reward_model_narrow", reward_model.run, dataclasses.replace(c.narrow, **trunk)),
            ("overoptimize_narrow", ppo.run, dataclasses.replace(free, reward=folder("reward_model_narrow"))),
        ]
    return steps


def export(source: Path, target: Path) -> None:
    """Copy the policy alone to where it is served from."""
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


SMOKE = Config(
    pretrain=pretrain.PRESETS["smoke"],
    sft=sft.PRESETS["smoke"],
    reward_model=reward_model.PRESETS["smoke"],
    ppo=ppo.PRESETS["smoke"],
    evaluate=evaluate.PRESETS["smoke"],
    sample_pairs=sample_pairs.PRESETS["smoke"],
    refresh=dataclasses.replace(reward_model.PRESETS["smoke"], steps=10, texts=24, pairs=8, optimizer=REFRESH.optimizer),
    ppo_again=ppo.PRESETS["smoke"],
    narrow=dataclasses.replace(reward_model.PRESETS["smoke"], domains=("movie",)),
    overoptimization=dataclasses.replace(OVEROPTIMIZE, iterations=4, batch=32, evaluate_every=2, held_out_prompts=48),
)
LARGE = dataclasses.replace(
    Config(),
    pretrain=dataclasses.replace(
        pretrain.Config(),
        model=dataclasses.replace(pretrain.MODEL, width=320, layers=6, heads=5, kv_heads=5, head_width=64, mlp_width=896),
        steps=3000,
    ),
)
PRESETS = {
    "default": Config(),
    "smoke": SMOKE,
    "large": LARGE,
    "overoptimize": dataclasses.replace(Config(), overoptimize=True),
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
