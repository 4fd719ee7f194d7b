"""transformers' `generate` as a contender of benchmarks/generate.py, in an environment of its own that has torch.

Reads the settings as JSON from its first argument, makes the model, and generates once for each line of stdin, answering with a
line of JSON: the seconds that it took, and those of all its threads.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch_products
import transformers


def main() -> None:
    """Answer until stdin ends."""
    settings = json.loads(sys.argv[1])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=settings["vocab"],
            hidden_size=settings["width"],
            intermediate_size=settings["mlp_width"],
            num_hidden_layers=settings["layers"],
            num_attention_heads=settings["heads"],
            num_key_value_heads=settings["heads"],
            max_position_embeddings=settings["prompt"] + settings["new"],
            tie_word_embeddings=True,
            eos_token_id=None,
        )
    ).eval()
    tokens = torch.randint(3, settings["vocab"], (settings["rows"], settings["prompt"]))
    ready = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "product_rates": torch_products.rates(settings["products"]),
    }
    print(json.dumps(ready), flush=True)
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        generate(model, tokens, settings)
        print(json.dumps({"wall": time.perf_counter() - start, "processor": time.process_time() - used}), flush=True)


@torch.no_grad()
def generate(model: transformers.LlamaForCausalLM, tokens: torch.Tensor, settings: dict) -> torch.Tensor:
    """Log-probs [B, R] of the tokens drawn, at temperature 1, as RLHF needs them."""
    new, width = settings["new"], tokens.shape[1]
    found = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=settings["top_p"],
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    columns = [
        torch.log_softmax(logits, -1).gather(-1, found.sequences[:, width + i, None])[:, 0]
        for i, logits in enumerate(found.logits)
    ]
    assert found.sequences.shape[1] == width + new
    return torch.stack(columns, 1)


if __name__ == "__main__":
    main()
