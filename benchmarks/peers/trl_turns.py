"""What the contenders of TRL share: one iteration of a trainer for each line of stdin."""

from __future__ import annotations

import json
import os
import resource
import sys
import time

import torch
import transformers


class Turns(transformers.TrainerCallback):
    """Holds the trainer between two iterations until a line comes, and answers with what the last one took."""

    def __init__(self, about: dict, steps: int = 1):
        """`about` is said first; an iteration ends with every `steps`-th step of the trainer."""
        self.about = about
        self.steps = steps
        self.updates = 0

    def on_train_begin(self, args, state, control, **given):
        """Say that the models are there, and wait for the first line."""
        print(json.dumps(self.about), flush=True)
        self.wait()

    def on_step_end(self, args, state, control, **given):
        """Answer with what this iteration took, and wait for the next line."""
        if state.global_step % self.steps:
            return
        wall, processor = time.perf_counter() - self.start, time.process_time() - self.used
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"wall": wall, "processor": processor, "peak_bytes": peak, "updates": self.updates}), flush=True)
        self.wait()

    def wait(self):
        """Until a line comes; the end of stdin ends the process."""
        if not sys.stdin.readline():
            os._exit(0)
        self.start, self.used = time.perf_counter(), time.process_time()


def counted(trainer: transformers.Trainer, turns: Turns) -> None:
    """Counts the steps of the trainer's optimizer, which it may make only when it begins to train."""

    def count(optimizer) -> None:
        take = optimizer.step

        def step(*given, **named):
            turns.updates += 1
            return take(*given, **named)

        optimizer.step = step

    if trainer.optimizer is not None:
        count(trainer.optimizer)
        return
    make = trainer.create_optimizer

    def made(*given, **named):
        found = make(*given, **named)
        count(trainer.optimizer)
        return found

    trainer.create_optimizer = made


@torch.no_grad()
def logprobs(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """[rows], the sum of the log-probs of every token but a row's first."""
    return torch.log_softmax(model(rows[:, :-1]).logits, -1).gather(-1, rows[:, 1:, None])[..., 0].sum(1)
