"""Serve the policy: OpenAI's interface, and a chat page on which people may choose between answers and judge them.

    python -m experiments.serve --policy runs/demo/policy                                    # http://127.0.0.1:8000
    python -m experiments.serve --policy runs/demo/policy --store runs/demo/feedback.sqlite --ask-share 0.2
    python -m experiments.serve --policy runs/demo/policy --store runs/demo/feedback.sqlite --people ann bob --host 0.0.0.0

The folder holds the policy alone. It may be a symlink: where it leads to another folder later, that policy is loaded, warmed
and served from then on; what was asked before is answered to its end by the one before (docs/serving.md). Ctrl-C ends it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from pathlib import Path
from typing import Any

import jax

from experiments import stage
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.feedback import accounts, gate, limits, store
from jaxrlhf.models import pretrained
from jaxrlhf.models.model import CacheConfig
from jaxrlhf.serving import desk, engine, server, texts, watch
from jaxrlhf.serving.protocol import Defaults
from jaxrlhf.training import cli


@dataclasses.dataclass(frozen=True)
class Config:
    policy: Path = Path("runs/demo/policy")  # a folder, or a symlink to one
    name: str = "policy"  # by which clients call it
    task: texts.Task = "continue"  # how the policy reads a message
    sampling: stage.Sampling = stage.Sampling(top_p=0.9)  # max_tokens: the most; temperature and top_p: where none is asked for
    slots: int = 32  # answers written at once
    width: int = 0  # tokens of a prompt; 0: what the context leaves beside the answer
    chunk: int = 4  # tokens between two looks at who waits
    cache: CacheConfig = CacheConfig()
    weights: stage.Weights = "float32"
    most: int = 8  # answers to one request
    look: float = 1.0  # seconds between two looks whether another policy was promoted
    grace: int = 5  # seconds that requests under way are given at the end
    store: Path | None = None  # where people's choices go; without one nothing is kept
    ask_share: float = 0.0  # of the answers on the page, shown two at a time to choose from
    people: tuple[str, ...] = ()  # accounts of the store; with any, every request needs a token
    renew: tuple[str, ...] = ()  # of these: people whose token is lost and gets a new one
    host: str = "127.0.0.1"  # what the service listens at; anything else needs --people
    port: int = 8000
    origins: tuple[str, ...] = ()  # how a proxy in front of it is called, as https://chat.example.org
    limits: limits.Limits = limits.Limits(body=1_048_576)


def run(config: Config) -> dict[str, Any]:
    """Serve until Ctrl-C or SIGTERM; requests under way are answered first."""
    ended = threading.Event()
    with serving(config) as (address, _), ending(ended):
        tell(config, address)
        ended.wait()
    print("ended", flush=True)
    return {}


@contextlib.contextmanager
def serving(config: Config):
    """The service from when it answers: its address and the engine.

    Raises:
        FileNotFoundError, ValueError: there is no such policy, or a setting does not fit it or another setting.
        OSError: the port is taken.
    """
    if config.sampling.top_k or config.sampling.min_p or config.sampling.replay:
        raise ValueError("--sampling.top-k, --sampling.min-p, --sampling.replay: not offered by the service, leave them out")
    site = site_of(config)
    seen = watch.place(config.policy)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])

    def load(folder: Path) -> engine.Policy:
        return policy_of(config, stage.load(folder, mesh, weights=config.weights))

    options = engine.Options(config.slots, config.width, config.chunk, config.limits.waiting, config.cache)
    answering = engine.Engine(load(Path(seen[0])), options)
    with (
        contextlib.closing(answering),
        server.running(site, answering, config.grace) as address,
        contextlib.closing(watch.Watch(config.policy, load, answering, seen, config.look)),
    ):
        yield address, answering


def site_of(config: Config) -> desk.Site:
    """What is served, and to whom. ValueError as `desk.Site`."""
    asked = config.sampling
    return desk.Site(
        config.name,
        Defaults(asked.temperature, asked.top_p, asked.max_tokens, config.most),
        config.task,
        config.store,
        bool(config.people),
        config.ask_share,
        config.limits,
        config.host,
        config.port,
        config.origins,
    )


def policy_of(config: Config, loaded: stage.Trained) -> engine.Policy:
    """A stage's model as the engine has it: temperature and top-p are those of each request."""
    spec = stage.spec(dataclasses.replace(config.sampling, temperature=1.0, top_p=1.0), loaded.tokenizer)
    version = pretrained.fingerprint(loaded.params)[:12]
    return engine.Policy(loaded.model, loaded.params, loaded.tokenizer, spec, version)


@contextlib.contextmanager
def ending(ended: threading.Event):
    """SIGINT and SIGTERM set the event for as long as the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tell(config: Config, address: str) -> None:
    """Print where the service is and, once, the token of each person."""
    address = config.origins[0] if config.origins else address
    print(f"{config.name}: the page {address}/, OpenAI's interface {address}/v1", flush=True)
    if unknown := set(config.renew) - {*config.people}:
        raise ValueError(f"--renew {sorted(unknown)[0]}: not one of --people")
    if config.people and config.store is not None:
        with contextlib.closing(store.open_store(config.store)) as db:
            for name in config.people:
                token = accounts.create(db, name, renew=name in config.renew)
                known = f"{address}/  (with the link printed before; --renew {name} makes a new one)"
                print(f"{name}: {known if token is None else f'{address}/#token={token}'}", flush=True)
    if config.host not in gate.LOOPBACK and not config.origins:
        print("anybody in reach of this address can read what is sent: put a proxy with TLS in front (--origins)", flush=True)
    print("Ctrl-C ends it; requests under way are answered first", flush=True)


PRESETS = {"default": Config()}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="policy")
