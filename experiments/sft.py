"""Stage 2: fine-tune the language model on continuations of reviews and on replies in a chat.

    python -m experiments.sft --init runs/demo/pretrain/model --out runs/demo/sft
    python -m experiments.sft --init runs/smollm2/model --conversations mine.jsonl --out runs/smollm2/sft

Its job at this size is to teach stopping and length, not a lower loss: more steps over-fit. With `--conversations` an imported
checkpoint learns the assistant's turns of a .jsonl file instead, by its own chat template (docs/hugging_face.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments import best, pretrain, stage
from jaxrlhf.algorithms import lm
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import chitchat, conversations, pipeline
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.training import cli, objective, optimizer, plan, step, timing
from jaxrlhf.training.flops import Pass
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run

NATS = "held_out/nll_per_token"  # of a response; the best step has the fewest


@dataclasses.dataclass(frozen=True)
class Config:
    init: Path = Path("runs/demo/pretrain/model")
    out: Path = Path("runs/demo/sft")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    steps: int = 50
    batch: int = 64  # rows
    review_share: float = 0.75  # of a batch; the rest are chat turns with their replies
    conversations: Path | None = None  # .jsonl of {"messages": [{"role": ..., "content": ...}, ...]}, in place of both
    skip_bad: bool = False  # leave bad lines of that file out, count them and name them in rejects.jsonl; else refuse it
    width: int = 512  # tokens of a conversation; a turn that ends later is left out
    held_out: float = 0.05  # of the conversations' turns
    evaluate_every: int = 0  # steps; also before the first and after the last. 0: before the first and after the last alone
    keep: best.Keep = "last"  # written as model/: the last weights, or the best that was measured (nats a token)
    lora: LoraConfig = LoraConfig()  # with a rank > 0: train an adapter over the frozen start
    frozen: stage.Weights = "float32"  # of the frozen start
    watch: timing.Options = timing.Options()  # wait for each stage, profile steps, refuse to compile after warm-up
    offload: Literal["none", "optimizer"] = "none"  # rests in the hosts' memory between updates
    optimizer: OptimizerConfig = OptimizerConfig(
        name="muon", muon_dtype="bfloat16", learning_rate=0.002, adam_learning_rate=4e-4, warmup_fraction=0.1, clip_norm=None
    )


def run(config: Config) -> dict[str, Any]:
    """Train, and write `model/` and `result.json` into `config.out`."""
    if config.frozen != "float32" and not config.lora.rank:
        raise ValueError(f"frozen='{config.frozen}' with lora.rank=0: then nothing is frozen; set a rank, 8 say")
    best.check(config.keep, config.evaluate_every)
    mesh = stage.mesh(config.mesh, batch=config.batch)
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        start = stage.load(config.init, mesh, weights=config.frozen)
        data, test, left_out = dataset(config, start.tokenizer, run)
        held_out = batch_of({name: array[:512] for name, array in test.items()})
        data = pipeline.within(data, start.config.vocab_size)
        batches = pipeline.by_step(lambda i: sharding.shard_batch(batch_of(data[i]), mesh))
        with jax.set_mesh(mesh):
            params, frozen = stage.trainable(start, config.lora, mesh, config.seed), {"base": start.params}
            outputs = objective.make_outputs(start.model, adapters=config.lora)
            judge = run.clock.timed("evaluate", measure(outputs, frozen, held_out))
            before = judge(params)[0][NATS]
            params = train(run, config, start.config, params, frozen, outputs, batches, judge)
            last = config.steps, config.evaluate_every, NATS, params, judge, config.keep
            params, (figures, _) = best.finish(run, *last, higher=False)
            stage.save_policy(config.out, start, params, config.lora, config.init)
        return run.done({"nll_per_token": figures[NATS], "nll_per_token_before": before, "turns_left_out": left_out})


def train(
    run: Run,
    config: Config,
    shape: TransformerConfig,
    params: Any,
    frozen: Any,
    outputs: objective.OutputsFn,
    batches: Any,
    judge: Callable[[Any], best.Judgement] | None = None,
) -> Any:
    """`config.steps` updates of a model, or of its adapter, on `batches[step]` (`lm.Batch`), from where `run` left off; with a
    `judge` measured as `config.evaluate_every` says."""
    update = optimizer.make(config.optimizer, config.steps, params)
    stage.tell_memory(run, plan.training(params, update) + plan.frozen(frozen or {}))
    state = stage.at_rest(run.restore(step.init_state(params, update, jax.random.key(config.seed))), config.offload)
    train_step = step.make_train_step(outputs, lm.loss, lm.Config(), update)
    train_step = run.clock.learner(train_step, Pass(shape, gradient=True, lora=config.lora))
    batches = stage.timed(run.clock, batches)
    for i in run.steps(run.start, config.steps, "sft", show=("loss/lm",)):
        judged = best.judged(run, i, config.evaluate_every, NATS, step.served(state), judge, higher=False) if judge else {}
        batch = batches[i]
        state, metrics = train_step(state, frozen, batch)
        run.log(i, judged | metrics, batch)
        run.maybe_save(i, state)
    return step.served(state)


def dataset(config: Config, tokenizer: Tokenizer, run: Run | None = None) -> tuple[Any, dict[str, np.ndarray], int]:
    """`[step]`: rows to learn from; rows held out; and how many turns of conversations were too long."""
    if config.conversations is None:
        replies, reviews, held_out = rows(tokenizer)
        share = (config.review_share, config.review_share)
        return pipeline.mixed(replies, reviews, config.batch, config.seed, config.steps, share), held_out, 0
    rejects = run.rejects() if run is not None and config.skip_bad else None
    chats = conversations.read(config.conversations, rejects)
    if run is not None and rejects is not None:
        run.left_out(config.conversations, rejects)
    turns, left_out = conversations.answer_rows(chats, tokenizer, config.width)
    count = len(turns["tokens"])
    few = max(1, round(config.held_out * count))
    if few >= count:
        raise ValueError(f"{config.conversations}: {count} turn(s) of the assistant, of which {few} are held out: give more")
    order = np.random.default_rng(config.seed).permutation(count)
    held_out, learned = ({name: array[part] for name, array in turns.items()} for part in (order[:few], order[few:]))
    return pipeline.batches(learned, config.batch, config.seed), held_out, left_out


def rows(tokenizer: Tokenizer) -> tuple[dict[str, np.ndarray], ...]:
    """Chat replies and review continuations to learn from, and held-out continuations."""
    turns, replies = zip(*chitchat.pairs()[:20_000], strict=True)
    encoded = [tokenizer.encode_batch([pipeline.clean(text) for text in side]) for side in (turns, replies)]
    bos, eos = tokenizer.bos, tokenizer.eos
    chat = pipeline.reply_rows(list(zip(*encoded, strict=True)), prompt_width=12, response_width=24, bos=bos, eos=eos)
    reviews = (tokenizer.encode_batch(pretrain.texts(split)) for split in ("train", "test"))
    train, test = (pipeline.continuation_rows(ids, bos=bos, eos=eos) for ids in reviews)
    return chat, train, test


def batch_of(rows: dict[str, np.ndarray]) -> lm.Batch:
    """Rows as the loss wants them; the response may be as wide as the row."""
    return lm.responses(rows["tokens"], rows["prompt_len"], rows["response_len"], rows["tokens"].shape[1] - 1)


def measure(outputs: objective.OutputsFn, frozen: Any, batch: lm.Batch) -> Callable[[Any], best.Judgement]:
    """(params) -> nats per response token of held-out rows; and nothing else."""
    program = jax.jit(lambda p, f: lm.loss(outputs(p, f, batch, None), batch, lm.Config())[0]["loss/lm"])

    def judge(params: Any) -> best.Judgement:
        term = program(params, frozen)
        return {NATS: float(term.sum / term.count)}, None

    return judge


PRESETS = {"default": Config(), "smoke": Config(steps=20, batch=16)}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="init")
