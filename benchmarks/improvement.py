"""Rounds of improvement with simulated people: does the judge's mean rise, do gates stop poison, does a rollback restore?

    python benchmarks/improvement.py --demo runs/demo --result benchmarks/results/2026-11-23-improvement.json

For each seed a chain of rounds from the demo's fine-tuned model and first reward model, then one whose choices are inverted.
Simulated people choose by VADER with errors in 10 %; the gate's judge is TextBlob. Chains that are done are read, not done
again. Figures, not speed. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}  # two-sided 95 % of Student's t, by degrees of freedom
SMALL = ("--ppo.iterations", "10", "--ppo.batch", "128", "--ppo.held-out-prompts", "64", "--ppo.evaluate-every", "10",
         "--reward-model.steps", "40", "--reward-model.held-out-texts", "256", "--prompts", "512")  # fmt: skip
FIGURES = ("kl", "length", "distinct_2", "proxy")


def main() -> None:
    """Run or read the chains, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--demo", type=Path, default=Path("runs/demo"), help="a finished loop: its sft and reward_model are read"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--simulate", type=int, default=512, help="prompts answered twice before each round")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=SMALL, help="of experiments/improve.py; the last of ours")
    parser.add_argument("--out", type=Path, default=Path("runs/studies/improvement"))
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    document = {
        "benchmark": "improvement",
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "machine": f"{os.cpu_count()} CPUs",
        "python": sys.version.split()[0],
        "rounds": config.rounds,
        "simulate": config.simulate,
        "flags": list(config.flags),
    }
    chains = {seed: one_chain(config, seed) for seed in config.seeds}
    document |= {"over_seeds": over_seeds(chains, config.rounds), "seeds": chains}
    if config.result is not None:
        config.result.parent.mkdir(parents=True, exist_ok=True)
        config.result.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


def one_chain(config: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Rounds of one seed, the poisoned one after them, and a rollback and back."""
    out = (config.out / f"seed{seed}").resolve()
    demo = config.demo.resolve()
    common = [
        "--start",
        demo / "sft" / "model",
        "--reward",
        demo / "reward_model" / "model",
        "--store",
        out.with_suffix(".sqlite"),
    ]
    common += ["--seed", seed, "--simulate", config.simulate, *config.flags]
    out.parent.mkdir(parents=True, exist_ok=True)
    improve(out, "--rounds", config.rounds, *common)
    rounds = [told(out, number) for number in range(1, config.rounds + 1)]
    improve(out, "--rounds", config.rounds + 1, "--simulated.inverted", *common)
    poisoned = told(out, config.rounds + 1)
    return {"rounds": rounds, "poisoned": poisoned, "rollback": there_and_back(out)}


def improve(out: Path, *flags: Any) -> None:
    """Run the script of the rounds."""
    command = [sys.executable, "-m", "experiments.improve", "--out", out, *flags]
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True, stdout=sys.stderr)


def told(out: Path, number: int) -> dict[str, Any]:
    """What is kept of a round's manifest."""
    manifest = json.loads((out / "rounds" / f"{number:03d}" / "round.json").read_text(encoding="utf-8"))
    rows = {
        name: {"judges": rounded(row["judges"])} | rounded({key: row[key] for key in FIGURES})
        for name, row in manifest["policies"].items()
    }
    choices = {name: manifest["snapshot"][name] for name in ("choices", "new", "learned", "held_out")}
    gates = [
        {name: gate[name] for name in ("name", "measured", "least", "most", "passed", "says")} for gate in manifest["gates"]
    ]
    kept = {name: manifest[name] for name in ("round", "served", "passed", "labelers")}
    refused = [gate["name"] for gate in gates if not gate["passed"]]
    return kept | {
        "refused_by": refused,
        "choices": choices,
        "policies": rows,
        "win_rate": manifest["win_rate"],
        "gates": gates,
    }


def rounded(row: dict[str, float]) -> dict[str, float]:
    """To five digits."""
    return {name: round(value, 5) for name, value in row.items()}


def there_and_back(out: Path) -> dict[str, Any]:
    """Roll back and forth again: whether the bytes and an answer are those from before."""
    served = int(os.readlink(out / "serving").split(os.sep)[1])
    before = state(out)
    improve(out, "--rollback", "previous")
    earlier = state(out)
    improve(out, "--rollback", served)
    return {"from": served, "changed": earlier != before, "restored": state(out) == before}


def state(out: Path) -> tuple[str, str]:
    """Hash of the parameters that are served, and what they answer."""
    command = [sys.executable, "-m", "experiments.chat", "--policy", str(out / "serving"), "--prompt", "this film is"]
    answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return hashlib.blake2b((out / "serving" / "params.safetensors").read_bytes()).hexdigest(), answer


def over_seeds(chains: dict[int, dict[str, Any]], count: int) -> dict[str, Any]:
    """Means over the seeds with 95 % intervals (Student's t), of what is served after each round; round 0 is the start."""
    result: dict[str, Any] = {}
    for judge in ("textblob", "vader"):
        rows = []
        for number in range(count + 1):
            values = [served_after(chain, number)["judges"][judge] for chain in chains.values()]
            rows.append({"round": number, **interval(values), "seeds": values})
        means = [row["mean"] for row in rows]
        result[judge] = {
            "rows": rows,
            "rises_each_round": all(b > a for a, b in itertools.pairwise(means)),
            "ends_above_round_0_in_every_seed": all(b > a for a, b in zip(rows[0]["seeds"], rows[-1]["seeds"], strict=True)),
        }
    result["kl"] = [
        {"round": n, **interval([served_after(chain, n)["kl"] for chain in chains.values()])} for n in range(count + 1)
    ]
    result["promoted"] = {seed: [row["passed"] for row in chain["rounds"]] for seed, chain in chains.items()}
    result["poisoned_refused_by"] = {seed: chain["poisoned"]["refused_by"] for seed, chain in chains.items()}
    result["rollback_restored"] = all(chain["rollback"]["restored"] for chain in chains.values())
    return result


def served_after(chain: dict[str, Any], number: int) -> dict[str, Any]:
    """The figures of the policy that is served after a round, on the held-out prompts."""
    if number == 0:
        return chain["rounds"][0]["policies"]["first"]
    row = chain["rounds"][number - 1]  # after one that was refused it is what it was before, measured once
    return row["policies"]["candidate"] if row["passed"] else served_after(chain, number - 1)


def interval(values: list[float]) -> dict[str, float]:
    """Mean and its 95 % interval."""
    mean, n = sum(values) / len(values), len(values)
    if n < 2:
        return {"mean": mean}
    half = T95[n - 1] * math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n)
    return {"mean": round(mean, 5), "low": round(mean - half, 5), "high": round(mean + half, 5)}


if __name__ == "__main__":
    main()
