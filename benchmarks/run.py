"""The benchmarks of this machine, ours and beside peers, in one dated result and one table of README.

    python benchmarks/run.py --all --compare --torch PYTHON --trl PYTHON --trl16 PYTHON --tunix PYTHON --readme \
        --result benchmarks/results/DATE-compare.json
    python benchmarks/run.py generate ppo_iteration --shapes tiny --compare --tunix PYTHON       # some

Each peer has an environment of its own, of which PYTHON is the interpreter: torch and transformers; trl 1.12, the last with
PPO; trl 1.16; google-tunix 0.1.7. What is not given is not run, and the result says so. Within a benchmark all contenders
live at once and take turns A B B A (`measure.alternate`), so that a drift of a shared machine cancels; benchmarks run one
after the other. A benchmark that fails is named with its last words, the others go on, and the exit code is 1. Left out are
those that take many minutes or compile for chips that are not here: loop, algorithms, studies, roles_memory, memory,
sharding, one_jit, remat. The last line of stdout is one JSON document: of every benchmark its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
PEERS = ("torch", "trl", "trl16", "tunix")


@dataclasses.dataclass(frozen=True)
class Job:
    script: str
    arguments: tuple[str, ...] = ()
    shapes: bool = True  # is run at every shape that is asked for
    peers: tuple[tuple[str, str], ...] = ()  # (our flag for its interpreter, the script's)

    def name(self, shape: str | None) -> str:
        """What the result calls it."""
        return " ".join([self.script, *(x for x in self.arguments if not x.startswith("-")), *([shape] if shape else [])])


JOBS = (
    Job("generate", peers=(("torch", "transformers"), ("tunix", "tunix"))),
    Job("train_step", ("--task", "sft"), peers=(("torch", "torch"),)),
    Job("train_step", ("--task", "reward"), peers=(("torch", "torch"),)),
    Job("ppo_iteration", peers=(("trl", "trl"), ("tunix", "tunix"))),
    Job("grpo_step", peers=(("trl16", "trl16"),)),
    Job("decode_step"),
    Job("rollout"),
    Job("divergence"),
    Job("sampling", shapes=False),
    Job("logprob", shapes=False),
    Job("gradient", shapes=False),
    Job("by_length", shapes=False),
    Job("compile", shapes=False),
    Job("save", shapes=False),
)
WORK = {  # as the table calls them
    "generate": "generation, top-p 0.9",
    "train_step sft": "update, fine-tuning",
    "train_step reward": "update, reward model",
    "ppo_iteration": "PPO iteration",
    "grpo_step": "GRPO iteration",
}
NAMES = {"transformers": "transformers", "torch": "eager torch", "trl": "TRL 1.12", "trl16": "TRL 1.16", "tunix": "Tunix 0.1.7"}
BARS = {("ppo_iteration", "tunix"): 1.7, ("grpo_step", "trl16"): 3.0}  # what we set out to reach


def main() -> None:
    """Run what is asked for, write the result and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="scripts to run")
    parser.add_argument("--all", action="store_true", help="all that there are")
    parser.add_argument("--compare", action="store_true", help="beside the peers whose interpreters are given")
    parser.add_argument("--shapes", nargs="+", choices=("tiny", "small", "gpt2"), default=["tiny", "small"])
    for peer in PEERS:
        parser.add_argument(f"--{peer}", type=Path, help=f"the interpreter of {peer}'s environment")
    parser.add_argument("--repeats", type=int, help="of every benchmark beside a peer, in place of its own; even")
    parser.add_argument("--readme", action="store_true", help="also write the table into README.md; needs --result")
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    refuse(parser, config)
    head = measure.head("run", vars(config))
    documents, failed = {}, {}
    for name, command in commands(config):
        print(f"{name} ...", file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            failed[name] = (done.stderr.strip() or "no words").splitlines()[-1]
        else:
            documents[name] = json.loads(done.stdout.splitlines()[-1])
    given = [peer for peer in PEERS if config.compare and getattr(config, peer)]
    document = head | {"not_run": [peer for peer in PEERS if peer not in given], "failed": failed, "documents": documents}
    measure.write(document, config.result)
    if config.readme:
        README.write_text(with_table(README.read_text(encoding="utf-8"), config.result.name, document), encoding="utf-8")
    if failed:
        raise SystemExit("\n".join(f"{name}: {said}" for name, said in failed.items()))


def refuse(parser: argparse.ArgumentParser, config: argparse.Namespace) -> None:
    """Ends with what is wrong with the settings, before anything runs."""
    scripts = sorted({job.script for job in JOBS})
    if config.all == bool(config.names):
        parser.error("give names of benchmarks, or --all for all of them")
    if unknown := set(config.names) - set(scripts):
        parser.error(f"no benchmark {', '.join(sorted(unknown))} here; there are {', '.join(scripts)}")
    given = [peer for peer in PEERS if getattr(config, peer)]
    if bool(given) != config.compare:
        parser.error("--compare goes with the interpreter of at least one peer: --" + " or --".join(PEERS))
    for peer in given:
        if not getattr(config, peer).exists():
            parser.error(f"--{peer}: there is no {getattr(config, peer)}")
    if config.readme and not (config.result and config.compare):
        parser.error("--readme needs --compare and --result: the table names the file that holds its figures")
    if config.repeats is not None and (config.repeats < 2 or config.repeats % 2):
        parser.error(
            f"--repeats {config.repeats} must be even, so that every contender runs as often before the others as after"
        )


def commands(config: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(name in the result, command) of everything that is to run."""
    found = []
    for job in JOBS:
        if not config.all and job.script not in config.names:
            continue
        for shape in config.shapes if job.shapes else [None]:
            command = [sys.executable, str(FOLDER / f"{job.script}.py"), *job.arguments]
            command += ["--shape", shape] if shape else []
            if config.compare:
                for ours, theirs in job.peers:
                    if getattr(config, ours):
                        command += [f"--{theirs}", str(getattr(config, ours))]
            if job.peers and config.repeats:
                command += ["--repeats", str(config.repeats)]
            found.append((job.name(shape), command))
    return found


# ------------------------------------------------------------------------------------------------ the table


def table(document: dict[str, Any]) -> str:
    """A line for each benchmark and peer, from a result."""
    lines = [
        "| | width | ours, ms | peer, ms | ratio | at most | share of own product rate: ours, peer | peak, MiB: ours, peer |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, each in document["documents"].items():
        for peer, equal in each.get("equal_work", {}).items():
            lines.append(row(name.rsplit(" ", 1)[0], peer, each["results"][equal], each, f"{peer} over {equal}"))
    load = max((each.get("load", 0.0) for each in document["documents"].values()), default=0.0)
    said = f"Commit {document['commit']}, {document['date']}, load of the machine up to {load:.1f} before a benchmark began."
    if document["not_run"]:
        said += f" Not run: {', '.join(document['not_run'])}."
    if document["failed"]:
        said += f" Failed: {', '.join(document['failed'])}."
    return "\n".join([*lines, "", said])


def row(work: str, peer: str, ours: dict[str, Any], each: dict[str, Any], ratio: str) -> str:
    """One line of the table."""
    theirs, bar = each["results"][peer], BARS.get((work, peer))
    cells = [
        f"{WORK[work]}, against {NAMES[peer]}",
        f"{each['model']['width']}",
        f"{ours['median_ms']:.0f}",
        f"{theirs['median_ms']:.0f}",
        f"{each['ratios'][ratio]:.2f} x" + (f" (aim {bar:g})" if bar else ""),
        f"{each['bound_by_products'][peer]:.1f} x",
        f"{ours['share_of_product_rate']:.2f}, {theirs['share_of_product_rate']:.2f}",
        ", ".join(f"{side['peak_bytes'] / 2**20:.0f}" for side in (ours, theirs)) if "peak_bytes" in ours else "",
    ]
    return "| " + " | ".join(cells) + " |"


BETWEEN = re.compile(r"<!-- peers: (\S*) -->\n.*?<!-- end of peers -->", re.DOTALL)


NONE = "none"  # in place of a file: nothing was measured on a quiet machine yet


def with_table(text: str, file: str, document: dict[str, Any] | None) -> str:
    """A text with the table of a result between its two marker comments, the first of which names the result's file.

    Raises:
        ValueError: the text has no such pair of comments, or more than one.
    """
    if len(BETWEEN.findall(text)) != 1:
        raise ValueError("one pair of comments must stand in the text: <!-- peers: FILE --> and <!-- end of peers -->")
    said = "Not yet measured on a quiet machine." if document is None else table(document)
    return BETWEEN.sub(lambda _: f"<!-- peers: {file} -->\n{said}\n<!-- end of peers -->", text)


if __name__ == "__main__":
    main()
