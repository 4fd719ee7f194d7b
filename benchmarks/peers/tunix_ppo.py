"""Tunix's PPOLearner as a contender of benchmarks/ppo_iteration.py, in an environment of its own that has google-tunix 0.1.7.

Reads the settings as JSON from its first argument, loads the models that ours wrote, and runs one iteration for each line of
stdin, answering as trl_ppo.py. Its own loop draws each minibatch after the update before it, a quarter of the rows at a time;
here its learner draws and scores all rows at once and its trainers take the minibatches one after the other, which is the same
work as ours and faster than its loop. A scalar model of Tunix is any module that gives [B, T, 1]: `Scorer`, its own Llama with
a head.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jax_products
import numpy as np
import optax
from flax import nnx
from safetensors import numpy as safetensors
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.rl import common, rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout


class Numbers:
    """A tokenizer whose words are ids, without a BOS, so that a prompt is the ids that ours reads."""

    def encode(self, text: str, **unused) -> list[int]:
        """The numbers of a text."""
        return [int(word) for word in text.split()]

    def decode(self, ids, **unused) -> str:
        """The text of numbers."""
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        """None is put before a prompt."""
        return 0

    def eos_id(self) -> int:
        """Would end a response."""
        return 2

    def pad_id(self) -> int:
        """Fills a row."""
        return 0


class Scorer(nnx.Module):
    """A Llama with a scalar at every token in place of its output head."""

    def __init__(self, trunk: llama.Llama3, weight: np.ndarray):
        """`weight` [D, 1]."""
        self.config = trunk.config
        self.trunk = trunk
        self.score = nnx.Param(jnp.asarray(weight))

    def __call__(self, input_tokens, positions, cache=None, attention_mask=None, segment_ids=None):
        """[B, T, 1]."""
        x = self.trunk.embedder.encode(input_tokens)
        for layer in self.trunk.layers:
            _, x = layer(x, positions, None, attention_mask)
        return self.trunk.final_norm(x) @ self.score[...]


def main() -> None:
    """Answer until stdin ends."""
    settings = json.loads(sys.argv[1])
    folder = Path(settings["folder"])
    tokens = np.load(folder / "prompts.npy")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        learner, judge = make(settings, folder, mesh)
        cluster = learner.rl_cluster
        rows = jnp.asarray(tokens[:2])
        graph, state = nnx.split(cluster.actor_trainer.model)
        pads = {"pad_id": 0, "eos_id": 2}
        found = common.compute_per_token_logps(graph, state, rows[:, :1], rows[:, 1:], **pads).sum(axis=1)
        scores = common.compute_score(judge, rows[:, :1], rows[:, 1:], **pads)[:, -1]
    versions = {name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax")}
    about = {
        "versions": versions,
        "threads": jax.device_count(),
        "product_rates": jax_products.rates(settings["products"]),
        "logprobs": found.tolist(),
        "scores": scores.tolist(),
    }
    print(json.dumps(about), flush=True)
    texts = [" ".join(map(str, row)) for row in tokens]
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        stages = iterate(learner, texts, settings)
        wall, processor = time.perf_counter() - start, time.process_time() - used
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        counts = {cluster.actor_trainer.train_steps, cluster.critic_trainer.train_steps}
        if len(counts) > 1:
            raise SystemExit(f"policy and critic made {counts} updates")
        said = {"wall": wall, "processor": processor, "peak_bytes": peak, "updates": counts.pop(), "stages": stages}
        print(json.dumps(said), flush=True)


def make(settings: dict, folder: Path, mesh: jax.sharding.Mesh) -> tuple[ppo_learner.PPOLearner, Scorer]:
    """The learner over four models of their own, and its reward model."""
    shape = settings["model"]
    config = llama.ModelConfig(
        num_layers=shape["layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["width"],
        hidden_dim=shape["mlp_width"],
        num_heads=shape["heads"],
        head_dim=shape["head_width"],
        num_kv_heads=shape["kv_heads"],
        rope_theta=int(shape["rope_theta"]),  # its attention does not read it: contest.ROPE_THETA
        norm_eps=shape["norm_epsilon"],
        weight_tying=True,
    )
    (file,) = (folder / "reward").glob("*.safetensors")
    weight = safetensors.load_file(file)["score.weight"].T

    def text_model() -> llama.Llama3:
        return llama_params.create_model_from_safe_tensors(str(folder / "policy"), config, mesh, jnp.float32)

    update = optax.chain(
        optax.clip_by_global_norm(settings["clip_norm"]), optax.adamw(settings["learning_rate"], weight_decay=0.0)
    )
    judge = Scorer(text_model(), weight)
    rows = settings["rows"]
    cluster = rl_cluster.RLCluster(
        actor=text_model(),
        critic=Scorer(text_model(), weight),
        reference=text_model(),
        reward=judge,
        tokenizer=Numbers(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=update,
                critic_optimizer=update,
                eval_every_n_steps=10**9,
                max_steps=10**9,
                mini_batch_size=rows // settings["minibatches"],
                train_micro_batch_size=rows // settings["minibatches"],
                rollout_micro_batch_size=rows,
                compute_logps_micro_batch_size=rows,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=settings["new"],
                max_prompt_length=settings["prompt"],
                kv_cache_size=settings["prompt"] + settings["new"],
                temperature=1.0,
                top_p=None,
                top_k=None,
                eos_tokens=[shape["vocab_size"] + 1],  # never drawn
            ),
        ),
    )
    return ppo_learner.PPOLearner(cluster, ppo_learner.PPOConfig(beta=settings["kl_coef"], kl_method="kl")), judge


def iterate(learner: ppo_learner.PPOLearner, texts: list[str], settings: dict) -> dict[str, float]:
    """One iteration; the seconds of its stages."""
    cluster, part = learner.rl_cluster, settings["rows"] // settings["minibatches"]
    times, generate = [time.perf_counter()], cluster.generate

    def timed(*given, **named):
        found = generate(*given, **named)
        times.append(time.perf_counter())
        if {len(row) for row in found.tokens} != {settings["new"]}:
            raise SystemExit(f"responses of {[len(row) for row in found.tokens]} tokens in place of {settings['new']}")
        return found

    cluster.generate = timed
    example = learner._generate_and_compute_advantage({"prompts": texts})
    cluster.generate = generate
    jax.block_until_ready((example.advantages, example.ref_per_token_logps))
    times.append(time.perf_counter())
    for i in range(settings["minibatches"]):
        minibatch = [rl_utils.get_batch_slice(example, slice(i * part, (i + 1) * part))]
        cluster.update_actor(minibatch, None)
        cluster.update_critic(minibatch, None)
    if learner.should_sync_weights:
        cluster.sync_weights()
    else:
        cluster.global_steps += 1
    jax.block_until_ready(jax.tree.leaves(nnx.state(cluster.actor_trainer.model)))
    times.append(time.perf_counter())
    return {name: times[i + 1] - times[i] for i, name in enumerate(("generate", "score", "update"))}


if __name__ == "__main__":
    main()
