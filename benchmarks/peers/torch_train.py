"""A training step of eager torch as a contender of benchmarks/train_step.py, in an environment of its own.

Reads the settings as JSON from its first argument, loads the model that ours wrote, and takes one step for each line of stdin,
answering with a line of JSON: the seconds that it took, those of all its threads, and the loss before the update.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
import torch_products
import transformers


def main() -> None:
    """Answer until stdin ends."""
    settings = json.loads(sys.argv[1])
    batch = {name: torch.from_numpy(x).long() for name, x in np.load(settings["batch"]).items()}
    reward = settings["task"] == "reward"
    kind = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(settings["folder"], dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    loss_of = reward_loss if reward else text_loss
    with torch.no_grad():
        first = loss_of(model, batch).item()
    about = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "product_rates": torch_products.rates(settings["products"]),
        "first_loss": first,
    }
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        wall, processor = time.perf_counter() - start, time.process_time() - used
        print(json.dumps({"wall": wall, "processor": processor, "loss": loss.item()}), flush=True)


def text_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean negative log-likelihood of every token but a row's first."""
    return model(input_ids=batch["tokens"], labels=batch["tokens"], use_cache=False).loss


def reward_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Bradley-Terry of rows [pairs, 2, T], the first of each preferred."""
    rows = batch["tokens"].flatten(0, 1)
    scores = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits.view(-1, 2)
    return -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1]).mean()


if __name__ == "__main__":
    main()
