"""Writes tests/golden/peft/: an adapter that the peft package saved, and the logits that it gives.

    pip install torch peft && python tests/golden_peft.py     # in an environment of its own; seen with the versions in the file

A Llama of two tiny layers with random weights, a LoRA on every linear layer of which neither factor is zero. What is stored:
the model's tensors by their Hugging Face names, the folder that `save_pretrained` wrote, tokens, and logits without the
adapter, with it, and merged by peft.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden" / "peft"


def main() -> None:
    """Make the files."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
        intermediate_size=32, max_position_embeddings=24, rms_norm_eps=1e-6, tie_word_embeddings=False,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(shape).eval()
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.3)
    weights = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(0, 40, (3, 11))
    with torch.no_grad():
        plain = model(tokens).logits.numpy()
        settings = peft.LoraConfig(
            r=3, lora_alpha=5, use_rslora=True, lora_dropout=0.0, task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
        )  # fmt: skip
        adapted = peft.get_peft_model(model, settings).eval()
        for name, tensor in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(tensor, std=0.2)
        beside = adapted(tokens).logits.numpy()
        adapted.save_pretrained(FOLDER)
        merged = adapted.merge_and_unload()(tokens).logits.numpy()
    (FOLDER / "README.md").unlink(missing_ok=True)
    versions = json.dumps({m.__name__: m.__version__ for m in (peft, torch, transformers)})
    np.savez_compressed(
        FOLDER / "numbers.npz", tokens=tokens.numpy().astype(np.int32), plain=plain, adapted=beside, merged=merged,
        versions=versions, **weights,
    )  # fmt: skip


if __name__ == "__main__":
    main()
