"""TRL's PPOTrainer as a contender of benchmarks/ppo_iteration.py, in an environment of its own that has torch and trl 1.12.

Reads the settings as JSON from its first argument, loads the models that ours wrote, and runs one iteration for each line of
stdin, answering with a line of JSON: the seconds that it took, those of all its threads, the most memory so far, the updates.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch_products
import transformers
import trl
from datasets import Dataset
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl_turns import Turns, counted, logprobs


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
        scores = judge(rows, attention_mask=torch.ones_like(rows)).logits[:, 0]
    turns = Turns(
        {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
            "threads": torch.get_num_threads(),
            "product_rates": torch_products.rates(settings["products"]),
            "logprobs": logprobs(policy, rows).tolist(),
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
    counted(trainer, turns)
    trainer.train()


if __name__ == "__main__":
    main()
