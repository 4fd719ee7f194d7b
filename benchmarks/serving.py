"""The service under many clients: 32 streams at once against the same 32 one after another.

    python benchmarks/serving.py

Over HTTP on loopback, with everything compiled before. Nothing stops an answer before its last token, so all do the same work.
`in_turn` asks a service of a single slot, whose steps cost what one row costs; with --same-slots it asks the one of all slots,
where a lone row pays for all of them. The target: at once takes less than a quarter. The last line of stdout is one JSON
document.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import threading
import urllib.parse
from pathlib import Path

import jax
import measure

from jaxrlhf.core.types import SamplingSpec
from jaxrlhf.data import arithmetic
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.feedback.limits import Limits
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.serving import desk, server
from jaxrlhf.serving.engine import Engine, Options, Policy
from jaxrlhf.serving.protocol import Defaults


def main() -> None:
    """Serve, stream, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens that a prompt may have")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument("--same-slots", action="store_true", help="in turn from the service of all slots")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    rates, policy = measure.machine(3), make_policy(config)
    with serving(policy, config, config.streams) as many, contextlib.ExitStack() as stack:
        one = many if config.same_slots else stack.enter_context(serving(policy, config, 1))
        cases = {
            "at_once": lambda: at_once(many, config),
            "in_turn": lambda: [stream(one, seed, config.tokens) for seed in range(config.streams)],
        }
        timed = measure.alternate(cases, config.repeats)
    share = timed["at_once"]["median_ms"] / timed["in_turn"]["median_ms"]
    written = config.streams * config.tokens
    timed["at_once"]["tokens_per_s"] = written / (1e-3 * timed["at_once"]["median_ms"])
    found = {"machine": rates, "cases": timed, "at_once_over_in_turn": share, "target": 0.25}
    measure.write(measure.head("serving", vars(config)) | found, config.result)


def make_policy(config: argparse.Namespace) -> Policy:
    """Random weights; no id ends an answer."""
    tokenizer = tokenizers.train((prompt for prompt, _ in arithmetic.demonstrations(200, 0.5, 1)), 259)
    heads = config.width // 64
    shape = TransformerConfig(
        config.vocab, config.width, config.layers, heads, heads, 64, 4 * config.width, config.prompt + config.tokens
    )
    model = transformer.build(shape)
    params = jax.jit(model.init)(jax.random.key(0))
    return Policy(model, params, tokenizer, SamplingSpec(1.0, config.tokens, ()), "random")


@contextlib.contextmanager
def serving(policy: Policy, config: argparse.Namespace, slots: int):
    """The address of a service with so many slots."""
    free = Limits(rate=1e9, burst=10**9)
    site = desk.Site("policy", Defaults(1.0, 0.9, config.tokens, 1), limits=free, port=0)
    with (
        contextlib.closing(Engine(policy, Options(slots, config.prompt, config.chunk))) as engine,
        server.running(site, engine) as address,
    ):
        yield address


def at_once(address: str, config: argparse.Namespace) -> None:
    """All streams, each from a client of its own."""
    failed: list[BaseException] = []

    def one(seed: int) -> None:
        try:
            stream(address, seed, config.tokens)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(config.streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def stream(address: str, seed: int, tokens: int) -> None:
    """Read one stream to its end, and hold it to its number of tokens."""
    with contextlib.closing(http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=600)) as connection:
        sent = {"model": "policy", "prompt": f"{seed}+{seed}=", "seed": seed, "stream": True}
        sent |= {"stream_options": {"include_usage": True}}
        connection.request("POST", "/v1/completions", json.dumps(sent), {"Content-Type": "application/json"})
        events = connection.getresponse().read().decode().split("\n\n")
    written = json.loads(events[-3].removeprefix("data: "))["usage"]["completion_tokens"]
    if written != tokens or events[-2] != "data: [DONE]":
        raise ValueError(f"{written} tokens, {tokens} were asked for; the stream ends with {events[-2][:80]!r}")


if __name__ == "__main__":
    main()
