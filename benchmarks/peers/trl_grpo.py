"""TRL's GRPOTrainer as a contender of benchmarks/grpo_step.py, in an environment of its own that has torch and trl 1.16.

Reads the settings as JSON from its first argument, loads the model that ours wrote, and runs one iteration (one generation and
its updates) for each line of stdin, answering as trl_ppo.py. Its default recomputes activations in the backward pass; here it
keeps them, which is faster.
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
from trl_turns import Turns, counted, logprobs


def even(prompts, completions, completion_ids, **unused) -> list[float]:
    """The share of even ids of each response: as grpo_step.py."""
    return [sum(id % 2 == 0 for id in ids) / len(ids) for ids in completion_ids]


def main() -> None:
    """Train until stdin ends."""
    settings = json.loads(sys.argv[1])
    folder = Path(settings["folder"])
    count = settings["rows"] // settings["samples"]
    tokens = np.load(folder / "prompts.npy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        report_to=[],
        per_device_train_batch_size=settings["rows"] // settings["minibatches"],
        gradient_accumulation_steps=1,
        steps_per_generation=settings["minibatches"],
        num_generations=settings["samples"],
        num_iterations=1,
        max_steps=100_000,
        max_completion_length=settings["new"],
        generation_kwargs={"min_new_tokens": settings["new"]},
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=settings["kl_coef"],
        loss_type="grpo",
        scale_rewards="group",
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=settings["clip_norm"],
        weight_decay=0.0,
        model_init_kwargs={"dtype": "float32"},  # of the reference, which it loads by the policy's name
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=policy,
        reward_funcs=even,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(count)]}),
    )
    # Its prompts are texts; ours are ids, which no text of this tokenizer need have: a prompt's text is its row.
    trainer._tokenize_prompts = lambda prompts: ([tokens[int(prompt)].tolist() for prompt in prompts], None, {})
    rows = torch.from_numpy(tokens[:2]).long()
    with torch.no_grad():
        scores = judge(rows, attention_mask=torch.ones_like(rows)).logits[:, 0]
    if not torch.equal(logprobs(trainer.ref_model, rows), logprobs(policy, rows)):
        raise SystemExit("TRL's reference is not the policy that it starts from")
    turns = Turns(
        {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
            "threads": torch.get_num_threads(),
            "product_rates": torch_products.rates(settings["products"]),
            "logprobs": logprobs(policy, rows).tolist(),
            "scores": scores.tolist(),
        },
        steps=settings["minibatches"],
    )
    trainer.add_callback(turns)
    counted(trainer, turns)
    check(trainer, settings)
    trainer.train()


def check(trainer: trl.GRPOTrainer, settings: dict) -> None:
    """Ends the process at a response that is shorter than asked for."""
    generate = trainer._generate_single_turn

    def checked(*given, **named):
        found, logprobs = generate(*given, **named)
        if [len(ids) for ids in found] != [settings["new"]] * settings["rows"]:
            raise SystemExit(f"responses of {[len(ids) for ids in found]} tokens in place of {settings['new']}")
        return found, logprobs

    trainer._generate_single_turn = checked


if __name__ == "__main__":
    main()
