"""TRL's PPOTrainer as a contender of benchmarks/ppo_iteration.py, in an environment of its own that has torch and trl 1.12.

Reads the settings as JSON from its first argument, loads the models that ours wrote, and runs one iteration for each line of
stdin, answering with a line of JSON: the seconds that it took, those of all its threads, the most memory so far, the updates.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Turns(transformers.TrainerCallback):
    """Holds the trainer between two iterations until a line comes, and answers with what the last one took."""

    def __init__(self, about: dict):
        self.about = about
        self.updates = 0

    def on_train_begin(self, args, state, control, **given):
        """Say that the models are there, and wait for the first line."""
        print(json.dumps(self.about), flush=True)
        self.wait()

    def on_step_end(self, args, state, control, **given):
        """Answer with what this iteration took, and wait for the next line."""
        wall, processor = time.perf_counter() - self.start, time.process_time() - self.used
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"wall": wall, "processor": processor, "peak_bytes": peak, "updates": self.updates}), flush=True)
        self.wait()

    def wait(self):
        """Until a line comes; the end of stdin ends the process."""
        if not sys.stdin.readline():
            os._exit(0)
        self.start, self.used = time.perf_counter(), time.process_time()


def main() -> None:
    """Train until stdin ends."""
    settings = json.loads(sys.argv[1])
    folder = Path(settings["folder"])
    tokens = np.load(folder / "prompts.npy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")

    def text_model():
        return transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)

    def scalar_model():
        return transformers.AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)

    policy, reference, critic, judge = text_model(), text_model(), scalar_model(), scalar_model()
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        report_to=[],
        per_device_train_batch_size=settings["rows"],
        gradient_accumulation_steps=1,  # with more, accelerate would step once for all of them
        num_mini_batches=settings["minibatches"],
        num_ppo_epochs=1,
        total_episodes=settings["rows"] * 10_000,
        local_rollout_forward_batch_size=settings["rows"],
        response_length=settings["new"],
        temperature=1.0,
        kl_coef=settings["kl_coef"],
        learning_rate=settings["learning_rate"],
        missing_eos_penalty=None,
        num_sample_generations=0,
        save_strategy="no",
        logging_strategy="no",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    rows = torch.from_numpy(tokens[:2]).long()
    with torch.no_grad():
        found = torch.log_softmax(policy(rows[:, :-1]).logits, -1).gather(-1, rows[:, 1:, None])[..., 0].sum(1)
        scores = judge(rows, attention_mask=torch.ones_like(rows)).logits[:, 0]
    turns = Turns(
        {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
            "threads": torch.get_num_threads(),
            "logprobs": found.tolist(),
            "scores": scores.tolist(),
        }
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=judge,
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        callbacks=[turns],
    )
    take = trainer.optimizer.step

    def counted(*given, **named):
        turns.updates += 1
        return take(*given, **named)

    trainer.optimizer.step = counted
    trainer.train()


if __name__ == "__main__":
    main()
