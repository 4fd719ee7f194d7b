"""Stage 4: train the policy with PPO, held near the model it starts from.

    python -m experiments.ppo --policy runs/demo/sft/model --reward runs/demo/reward_model/model --out runs/demo/ppo
    python -m experiments.ppo --preset arithmetic            # sums; first: python -m experiments.arithmetic

One iteration: sample answers, score them, turn scores and KL into advantages, a few epochs of clipped updates. To change the
algorithm, copy jaxrlhf/algorithms/ppo.py and this page.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax

from experiments import ahead, pretrain, stage, tasks
from jaxrlhf.algorithms import lm, ppo
from jaxrlhf.core import processes, sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import pipeline
from jaxrlhf.models import heads, lora, roles
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.rewards import ensemble, pool
from jaxrlhf.sampling import rollout
from jaxrlhf.training import cli, objective, optimizer, recorder, step, timing
from jaxrlhf.training.by_length import Microbatches
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run

TEXT_WIDTH = 32  # tokens of a row of the pre-training mix


@dataclasses.dataclass(frozen=True)
class Config:
    task: tasks.Name = "sentiment"
    policy: Path = Path("runs/demo/sft/model")  # where the policy starts, and the reference it is held near
    reward: Path = Path("runs/demo/reward_model/model")  # scores the sentiment task; or an `adapter`
    out: Path = Path("runs/demo/ppo")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    iterations: int = 24
    batch: int = 256  # answers an iteration, each to its own prompt
    sampling: stage.Sampling = stage.Sampling()
    rollouts: rollout.Options = rollout.Options()
    algorithm: ppo.Config = ppo.Config(kl_coef=0.12)
    critic: Literal["shared", "separate", "reward"] = "shared"  # value head on the policy's trunk; its own; the reward model's
    lora: LoraConfig = LoraConfig()  # with a rank > 0: train adapters over the frozen start, of policy and separate critic
    frozen: stage.Weights = "float32"  # of the frozen start: what adapters lie over, and the reference
    offload: stage.Offload = "none"  # rests in the hosts' memory between the programs that use it
    ema_decay: float | None = None  # serve an average of the policy's weights over iterations instead of the last ones
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", learning_rate=3e-4, b2=0.98, warmup_fraction=0.1, final_fraction=0.1, clip_norm=1.0
    )
    microbatches: Microbatches = Microbatches()  # of a minibatch; with `tokens` rows of about equal length
    evaluate_every: int = 6  # iterations; also before the first and after the last
    held_out_prompts: int = 384
    pool: pool.Config = pool.Config()  # child processes for reward functions, and functions of your own
    watch: timing.Options = timing.Options()  # wait for each stage, profile steps, refuse to compile after warm-up


def run(config: Config) -> dict[str, Any]:
    """Train, and write `model/` (the policy alone) and `result.json` into `config.out`."""
    mesh = stage.mesh(
        config.mesh,
        (config.batch, config.algorithm.minibatches),
        batch=config.batch,
        held_out_prompts=config.held_out_prompts,
    )
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        with jax.set_mesh(mesh), tasks.make(config, mesh, config.frozen, config.offload) as task:
            return train(run, config, task, mesh)


def train(run: Run, config: Config, task: tasks.Task, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Train the task's policy, whatever the task is."""
    task, start, algorithm = tasks.timed(run.clock, task), task.start, config.algorithm
    params = {"policy": stage.trainable(start, config.lora, mesh, config.seed)} | value_function(config, start, mesh)
    frozen = {"reference": start.params}
    exact, mixed = algorithm.kl_estimator == "exact", algorithm.text_coef > 0
    update = optimizer.make(config.optimizer, config.iterations * algorithm.epochs * algorithm.minibatches, params)
    tasks.tell_memory(run, config, task, params, update, n=1, options=config.rollouts, average=config.ema_decay is not None)
    keys = jax.random.split(jax.random.key(config.seed))  # of the updates, and of the answers
    state = step.init_state(params, update, keys[0], ppo.init(algorithm))
    del params  # which the state has copied: a critic's trunk need not stand in memory twice
    if config.ema_decay is not None:
        state = step.update_ema(state, config.ema_decay)
    state, begun = run.restore((state, tasks.under_way(config, task, 1, mesh)))
    state = stage.at_rest(state, config.offload)
    in_loss = exact and algorithm.kl_in == "loss"
    outputs = objective.make_outputs(
        start.model, task.spec, entropy=True, values=True, ref_kl=in_loss, text=mixed, trunk="policy", adapters=config.lora
    )
    run_epochs = step.make_epochs(
        outputs, ppo.loss, algorithm, update, algorithm.epochs, algorithm.minibatches, config.microbatches
    )
    run_epochs = run.clock.learner(run_epochs, *tasks.learning(config, task, state.params, in_loss), times=algorithm.epochs)
    options, texts = dataclasses.replace(config.rollouts, exact_kl=exact), text_batches(config, start) if mixed else None
    collect = tasks.collector(run.clock, config, task, frozen, 1, options)
    prepare, describe = jax.jit(ppo.prepare, static_argnames="config"), jax.jit(rollout.stats)

    def over_start(params: Any) -> Any:
        return roles.attach(start.params, params, config.lora)

    if texts is None:
        ahead.start(run.clock, task, over_start(state.params), frozen, state, (prepare, algorithm, run_epochs), 1, options)
    prepare = run.clock.timed("update", prepare, after="prepare")
    rewards_of, texts_of = jax.jit(ppo.token_rewards, static_argnames="config"), start.tokenizer

    def sampled(experience: Any, batch: ppo.Batch, kept: ppo.State) -> list[dict[str, Any]]:
        rewards = rewards_of(experience, kept, config=algorithm)
        return recorder.of_experience(experience, batch.advantages, rewards, texts_of.token_texts, texts_of.decode)

    for i in run.steps(run.start, config.iterations, "ppo", show=("reward/score", "policy/kl_ref")):
        judged = {} if i % config.evaluate_every else task.judge(over_start(served(state)))[0]
        prompts = sharding.shard_batch(task.prompts[i], mesh)
        key = jax.random.fold_in(keys[1], i)
        current = over_start(state.params)
        experience, prompts, begun = collect(current, prompts, key, i, begun)
        score, weight, rewarded = task.score(experience.rollout, prompts)
        experience = dataclasses.replace(experience, score=score, weight=weight)
        drawn = describe(experience)
        batch, kept, stats = prepare(experience, state.algorithm, config=algorithm)
        run.sample(i, sampled, experience, batch, state.algorithm)
        if texts is not None:
            batch = dataclasses.replace(batch, text=sharding.shard_batch(lm.packed(**texts[i]), mesh))
        state, metrics = run_epochs(dataclasses.replace(state, algorithm=kept), frozen, batch)
        if config.ema_decay is not None:
            state = step.update_ema(state, config.ema_decay)
        run.log(i, judged | rewarded | drawn | stats | metrics, batch)
        run.maybe_save(i, (state, begun))
    run.maybe_save(config.iterations - 1, (state, begun), last=True)
    judged, samples = task.judge(over_start(served(state)))
    run.log(config.iterations, judged)
    stage.save_policy(config.out, start, served(state), config.lora, config.policy)
    curve = [row for row in run.metrics() if "held_out/kl" in row]
    return run.done({"curve": curve, "samples": samples})


def value_function(config: Config, start: stage.Trained, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """{"value": head} on the policy's trunk, or {"critic": trunk (or an adapter) and head}: see models/roles.py."""
    if config.critic == "reward":  # of an ensemble, its first member
        judged = stage.load_reward(config.reward, mesh, start)
        several = stage.ensembled(judged.settings)
        params = judged.params if several is None else ensemble.member(judged.params, 0, several)
        shared = judged.settings["kind"] == "reward_adapter"
        return {"critic": roles.critic_from_reward(params, config.lora if shared else lora.NONE)}
    if config.critic == "separate":
        return {"critic": roles.critic(stage.trainable(start, config.lora, mesh, config.seed + 1), start.config.width)}
    value = sharding.init_params(heads.value_specs(start.config.width), jax.random.key(config.seed))
    return {"value": processes.from_host(value, sharding.replicated(mesh))}


def text_batches(config: Config, start: stage.Trained) -> Any:
    """`[iteration]`: as many packed rows of reviews as answers, for the language-model loss beside PPO's."""
    rows, _ = pipeline.encode_rows(pretrain.texts("train"), start.tokenizer, 8 * config.batch, TEXT_WIDTH, config.seed)
    tokens, segments = pipeline.pack(rows, TEXT_WIDTH, start.tokenizer.bos, start.tokenizer.eos)
    return pipeline.batches({"tokens": tokens, "segments": segments}, config.batch, config.seed)


def served(state: Any) -> Any:
    """The policy, or its adapter, as it is judged and saved: the average of its weights where there is one."""
    return step.served(state)["policy"]


ARITHMETIC = Config(
    task="arithmetic",
    policy=tasks.ARITHMETIC_POLICY,
    out=Path("runs/arithmetic/ppo"),
    iterations=100,
    sampling=tasks.ARITHMETIC,
    algorithm=ppo.Config(kl_coef=0.01, lam=1.0),
    optimizer=dataclasses.replace(Config().optimizer, learning_rate=7e-4),
    evaluate_every=25,
    held_out_prompts=500,
)
PRESETS = {
    "default": Config(),
    "smoke": Config(iterations=4, batch=32, evaluate_every=2, held_out_prompts=48),
    "arithmetic": ARITHMETIC,
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="policy")
