"""A whole iteration of PPO in one program: the stage-wise script's parameters, and many runs side by side, each as if alone."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import one_jit, stage
from experiments import ppo as stagewise
from jaxrlhf.core.types import Prompts, Rollout
from jaxrlhf.data import arithmetic
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import functions

MODEL = TransformerConfig(259, 16, 1, 2, 2, 8, 32, 16)


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.train((row["prompt"] for row in arithmetic.problems("train")[:200]), 259)


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> stagewise.Config:
    """PPO on sums from a start that knows nothing, two iterations."""
    folder = tmp_path_factory.mktemp("start") / "model"
    config = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    params = transformer.build(config).init(jax.random.key(0))
    # Digits are likely, so that there is something to be rewarded.
    digits = [i for i, piece in enumerate(tokenizer.pieces()) if piece.isdigit()]
    params["embed"] = params["embed"].at[jnp.asarray(digits)].add(0.3)
    stage.save(folder, "policy", jax.device_get(params), config, tokenizer)
    algorithm = dataclasses.replace(stagewise.ARITHMETIC.algorithm, minibatches=2)
    # A large epsilon: Adam's own turns the rounding of a gradient near 0 into the sign of its update.
    update = dataclasses.replace(stagewise.ARITHMETIC.optimizer, epsilon=1e-3)
    return dataclasses.replace(
        stagewise.ARITHMETIC,
        optimizer=update,
        policy=folder,
        iterations=2,
        batch=16,
        algorithm=algorithm,
        held_out_prompts=16,
        evaluate_every=5,
    )


def policy(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "model" / "params.safetensors")


def assert_same(found: dict[str, np.ndarray], want: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> None:
    """To 1e-6, and they moved by far more than that."""
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6, err_msg=name)
    assert max(np.abs(want[name] - start[name]).max() for name in want) > 1e-4


@pytest.mark.full
def test_one_program_and_many_runs_train_what_the_script_trains(base, tmp_path, monkeypatch):
    """Alone, and beside runs of another seed, learning rate and KL coefficient."""
    monkeypatch.setattr(jax, "devices", lambda *args: jax.local_devices()[:1])  # as on a machine with one device
    start = load_file(base.policy / "params.safetensors")
    # A setting that is not the base's own.
    algorithm = dataclasses.replace(base.algorithm, kl_coef=2.0)
    changed = dataclasses.replace(base.optimizer, learning_rate=2e-4)
    stagewise.run(dataclasses.replace(base, out=tmp_path / "ppo", seed=3, algorithm=algorithm, optimizer=changed))
    want = policy(tmp_path / "ppo")
    one_jit.run(one_jit.Config(base, tmp_path / "one", seeds=(3,), learning_rates=(2e-4,), kl_coefs=(2.0,)))
    assert_same(policy(tmp_path / "one" / "0"), want, start)
    one_jit.run(one_jit.Config(base, tmp_path / "several", seeds=(2, 3), learning_rates=(7e-4, 2e-4), kl_coefs=(2.0,)))
    rows = json.loads((tmp_path / "several" / "result.json").read_text())["settings"]
    found = [(row["seed"], row["learning_rate"], row["kl_coef"]) for row in rows]
    assert found == [(s, r, c) for s in (2, 3) for r in (7e-4, 2e-4) for c in (2.0,)]
    for n, setting in enumerate(found):
        own = policy(tmp_path / "several" / str(n))
        if setting == (3, 2e-4, 2.0):
            assert_same(own, want, start)
        else:
            assert max(np.abs(own[name] - want[name]).max() for name in want) > 5e-6  # each its own


def test_the_rule_on_tokens_is_the_rule_on_texts(tokenizer):
    rows = arithmetic.problems("train")[:40]
    rng = np.random.default_rng(0)
    id_of = {piece: i for i, piece in enumerate(tokenizer.pieces()) if len(piece) == 1}
    responses = []
    for i, row in enumerate(rows):
        answer = row["answer"]
        text = [answer, f" {answer}", f"{answer} ", f"  {answer}\n", answer[:-1], answer + "0", "x" + answer, "", " ", "12 3"][
            i % 10
        ]
        ids = [id_of[bytes([byte])] for byte in text.encode()][:6]
        responses.append(ids + [tokenizer.eos] * (i % 3 > 0 and len(ids) < 6))
    responses += [rng.integers(0, 3 + 256, rng.integers(0, 7)).tolist() for _ in range(40)]
    responses = [[i for i in ids if i not in (tokenizer.bos, tokenizer.pad)] for ids in responses]
    for ids in responses[40:]:  # ASCII alone, as it is said
        ids[:] = [i for i in ids if i == tokenizer.eos or tokenizer.pieces()[i] < b"\x80"]
        ids[:] = ids[: ids.index(tokenizer.eos) + 1] if tokenizer.eos in ids else ids
    index = np.arange(80) % 40
    tokens = np.full((80, 9), id_of[b"1"])  # what stands behind a response is not read
    for n, ids in enumerate(responses):
        tokens[n, 2 : 2 + len(ids)] = ids
    length = np.array([len(ids) for ids in responses])
    zeros = np.zeros(80, np.int32)
    drawn = Rollout(
        *(jnp.asarray(x, jnp.int32) for x in (tokens, zeros + 2, length)), jnp.zeros(80, bool), zeros, zeros, zeros,
        logprobs=jnp.zeros((80, 6)), sampled_logprobs=jnp.zeros((80, 6)),
    )  # fmt: skip
    prompts = Prompts(jnp.zeros((80, 2), jnp.int32), jnp.asarray(zeros + 2), jnp.asarray(zeros), jnp.asarray(index, jnp.int32))
    found = one_jit.sums_reward(tokenizer, rows)(None, drawn, prompts)
    own = [rows[i] for i in index]
    exact = functions.apply(functions.exact_match, drawn, tokenizer.decode, own).score
    digits = functions.apply(functions.format_match(r"\d+"), drawn, tokenizer.decode, own).score
    assert 0 < exact.sum() < digits.sum() < 80
    np.testing.assert_allclose(found, exact + np.float32(0.1) * digits, atol=1e-7)


FREE = dataclasses.replace(stagewise.ARITHMETIC.optimizer, name="schedule_free", schedule="constant")


@pytest.mark.parametrize("change", [{"ema_decay": 0.9}, {"optimizer": FREE}], ids=["ema_decay", "schedule_free"])
def test_what_one_program_cannot_do_is_refused(tmp_path, change, request):
    with pytest.raises(ValueError, match=f"one_jit: .*{request.node.callspec.id}"):
        one_jit.run(one_jit.Config(dataclasses.replace(stagewise.ARITHMETIC, **change), tmp_path / "out"))
    with pytest.raises(ValueError, match="seeds is empty"):
        one_jit.Config(seeds=())
    with pytest.raises(ValueError, match=r"kl_coefs=\(-1,\) must all be > 0"):
        one_jit.Config(kl_coefs=(-1,))
