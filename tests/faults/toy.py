"""A training run that takes seconds, for tests that kill it: a least-squares problem, a batch a step, Adam.

It says on stdout what it is doing (`step 3`, `saving 4`), so that a test can strike there. Flags beside those of every script:
FAULT in the environment names one to inject.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

from jaxrlhf.training import cli


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    steps: int = 6
    width: int = 100  # of the square weights
    pause: float = 0.0  # seconds a step
    evaluate_every: int = 0  # steps: then the loss on rows that are never learned from, of which the best is kept


def run(config: Config) -> dict:
    """Train, and write the parameters as `params.npy`."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxrlhf.core.types import Outputs, Term
    from jaxrlhf.training import checkpoint, run
    from jaxrlhf.training import step as train

    fault = os.environ.get("FAULT", "")  # "no look at the disk", or "not finite from STEP"
    bad_from = int(fault.removeprefix("not finite from")) if fault.startswith("not finite") else None
    original = checkpoint.save_async

    def told(directory, step, *rest, **named):
        print("saving" if directory.name == "checkpoints" else "keeping", step, flush=True)
        return original(directory, step, *rest, **named)

    checkpoint.save_async = told
    if fault == "no look at the disk":
        checkpoint._check_space = lambda *_: None

    def outputs(params, frozen, batch, key):
        return Outputs(scores=(batch @ params["w"]).sum(axis=1) + 0.01 * jax.random.normal(key, (batch.shape[0],)))

    def loss(outputs, batch, config):
        return {"loss/toy": Term(jnp.square(outputs.scores - 1).sum(), jnp.float32(batch.shape[0]))}, {}

    with run.Run.open(config.out, config, tensorboard=False, free=("out",)) as opened:
        if opened.result is None:
            made = optax.adam(0.01)
            train_step = train.make_train_step(outputs, loss, None, made)
            first = jax.random.normal(jax.random.key(7), (config.width, config.width))
            held_out = jax.random.normal(jax.random.key(2), (16, config.width))
            state = opened.restore(train.init_state({"w": first}, made, jax.random.key(0)))
            for step in opened.steps(opened.start, config.steps, "toy"):
                print("step", step, flush=True)
                if config.evaluate_every and step % config.evaluate_every == 0:
                    error = float(jnp.square((held_out @ state.params["w"]).sum(axis=1) - 1).mean())
                    opened.best(step, "held_out/error", error, state.params, higher=False)
                batch = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (4, config.width))
                if bad_from is not None and step >= bad_from:
                    batch = batch.at[0, 0].set(jnp.nan)
                state, metrics = train_step(state, (), batch)
                opened.log(step, metrics, {"rows": batch})
                opened.maybe_save(step, state)
                time.sleep(config.pause)
            np.save(config.out / "params.npy", np.asarray(state.params["w"]))
            opened.done({"steps": config.steps})
    return opened.result


if __name__ == "__main__":
    cli.main(run, Config)
