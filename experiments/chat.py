"""Talk to the policy: it is loaded alone, from a folder without optimizer, value head, reward model or reference.

    python -m experiments.chat --policy runs/demo/policy                       # type the first words of a review
    python -m experiments.chat --policy runs/demo/policy --task reply          # type a turn of a chat
    python -m experiments.chat --policy runs/smollm2/model --task template     # by an imported checkpoint's chat template
    python -m experiments.chat --policy runs/demo/policy --prompt "a film that" # once
    python -m experiments.chat --policy runs/demo/policy --ask                 # choose between two answers

With `--ask` every prompt, both answers and the choice go to the feedback store, for the next round of training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import stage
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.data import pipeline
from jaxrlhf.feedback import labelers, store
from jaxrlhf.sampling import generate
from jaxrlhf.serving import texts
from jaxrlhf.training import cli


@dataclasses.dataclass(frozen=True)
class Config:
    policy: Path = Path("runs/demo/policy")
    prompt: str | None = None  # answer this and stop; without it, lines are read until the input ends
    task: texts.Task = "continue"  # continue a review; or reply, in our format or the checkpoint's
    ask: bool = False  # show two answers and keep the choice
    store: Path = Path("runs/demo/feedback.sqlite")  # where choices are kept
    name: str = "user"  # of the person, stored with every choice
    seed: int = 0
    sampling: stage.Sampling = stage.Sampling(top_p=0.9)
    truncate: bool = False  # leave out the beginning of a prompt that is too long, and say how much of it; else refuse it
    stop_strings: tuple[str, ...] = ()  # an answer ends with the first of these that it writes


def run(config: Config) -> dict[str, Any]:
    """Answer one prompt or many."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    policy = stage.load(config.policy, mesh)
    spec = dataclasses.replace(stage.spec(config.sampling, policy.tokenizer), stop_strings=config.stop_strings)
    answered = 0
    with contextlib.ExitStack() as stack:
        db = stack.enter_context(contextlib.closing(store.open_store(config.store))) if config.ask else None
        for number, text in enumerate(lines(config)):
            prompt = prompt_of(config, policy, spec, text, number)
            if db is None:
                answer(config, policy, spec, prompt, text)
            else:
                choose(config, db, policy, spec, prompt, text)
            answered += 1
    return {"answered": answered}


def lines(config: Config):
    """The prompts: the one given, or what is typed."""
    if config.prompt is not None:
        yield config.prompt
        return
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def prompt_of(config: Config, policy: stage.Trained, spec: SamplingSpec, text: str, number: int) -> Prompts:
    """The text as the policy reads it.

    Raises:
        ValueError: the prompt and the answer do not fit into the model's context.
    """
    tokenizer = policy.tokenizer
    ids = texts.prompt(tokenizer, text, config.task)
    room = policy.model.max_length - spec.max_tokens
    if len(ids) > room and config.truncate and room > 1:
        print(f"(the prompt's first {len(ids) - room} tokens are left out: {room} fit)", file=sys.stderr, flush=True)
        ids = [ids[0], *ids[1 - room :]]
    if len(ids) > room:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, but the model's context is {policy.model.max_length}, with "
            f"{spec.max_tokens} kept for the answer: shorten it to {room} tokens, lower --sampling.max-tokens, or --truncate"
        )
    width = min(-(-len(ids) // 8) * 8, room)  # few widths, few programs
    tokens, length = pipeline.pad_rows([ids], width)
    return Prompts(tokens, length, np.array([number], np.int32), np.zeros(1, np.int32))


def answer(config: Config, policy: stage.Trained, spec: SamplingSpec, prompt: Prompts, text: str) -> None:
    """Print an answer as it is written."""
    print(text if config.task == "continue" else "", end="", flush=True)
    ids: list[int] = []
    printed = ""
    pieces = generate.stream(
        policy.model,
        policy.params,
        prompt,
        spec,
        jax.random.key(config.seed),
        stop_table=stage.stop_table(spec, policy.tokenizer, policy.model.vocab_size),
    )
    for piece in pieces:
        ids += piece[0]
        whole = texts.shown(policy.tokenizer.decode(ids, continuation=True), spec.stop_strings, ended=False)
        whole = whole if config.task == "continue" else whole.lstrip()
        print(whole[len(printed) :], end="", flush=True)
        printed = whole
    whole = texts.shown(policy.tokenizer.decode(ids, continuation=True), spec.stop_strings, ended=True)
    whole = whole if config.task == "continue" else whole.strip()
    print(whole[len(printed) :], flush=True)


def answers_to(policy: stage.Trained, spec: SamplingSpec, prompt: Prompts, seed: int, n: int) -> list[str]:
    """n answers to one prompt."""
    table = stage.stop_table(spec, policy.tokenizer, policy.model.vocab_size)
    drawn = generate.generate(policy.model, policy.params, prompt, spec, jax.random.key(seed), n, stop_table=table)
    return [texts.shown(each, spec.stop_strings, ended=True) for each in stage.texts(drawn, policy.tokenizer)[1]]


def choose(
    config: Config, db: sqlite3.Connection, policy: stage.Trained, spec: SamplingSpec, prompt: Prompts, text: str
) -> None:
    """Let the person choose between two answers, and keep prompt, answers and choice."""
    answers = list(dict.fromkeys(answers_to(policy, spec, prompt, config.seed, 8)))[:2]  # in the order drawn, equal ones once
    if len(answers) < 2:
        print(f"{answers[0].strip()}   (every answer drawn was this one: nothing to choose)")
        return
    writer = str(config.policy)
    pair = store.Pair(pipeline.clean(text), answers[0], answers[1], writer, writer, json.dumps(dataclasses.asdict(spec)))
    store.add_pairs(db, [pair])
    labelers.label_at_terminal(db, config.name, limit=1, pair=pair)


PRESETS = {"default": Config()}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="policy")
