"""The page of one run: its curves, its rollouts token by token, what alarmed it, where its time went, what it ran on."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.evaluation import page, plots
from jaxrlhf.evaluation.page import (
    Block,
    Figure,
    Figures,
    Folded,
    Heading,
    HeatMaps,
    Paragraph,
    Rollout,
    Shares,
    Table,
    Tile,
    Tiles,
)

FIRST = (  # what is looked at first, where a run has it; the rest is folded
    *(
        "held_out/accuracy",
        "held_out/proxy",
        "held_out/kl",
        "reward/score",
        "reward/accuracy",
        "policy/kl_ref",
        "policy/entropy",
    ),
    *("loss/lm", "loss/total", "rollout/length", "rollout/finished", "value/explained_variance", "policy/clip_fraction"),
    "optimizer/grad_norm",
)
TROUBLE = ("alarm", "skipped", "stopped", "not saved", "samples left out")  # kinds of events
NUMBERS = {"kl": "KL", "advantage": "advantage", "value": "value", "reward": "reward", "logprob": "log-prob"}
POINTS = 400  # of a curve
EVENTS = 200  # told one by one
SHOWN = 5  # steps whose rollouts are on the page

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a run's directory holds."""

    rows: Sequence[Row]  # metrics.jsonl
    events: Sequence[Row]
    samples: Sequence[Row]
    settings: str  # config.yaml
    environment: Row
    times: Row  # run.json
    result: Row | None  # of a run that is done


def all_of(facts: Facts, steps: Sequence[int] = ()) -> list[Block]:
    """The whole page; `steps` whose rollouts are shown, or a few spread over the run."""
    return [*tiles(facts), *troubles(facts), *curves(facts), *rollouts(facts, steps), *times(facts), *about(facts)]


def tiles(facts: Facts) -> list[Block]:
    """How far the run is, and its last figures."""
    steps = max((row["step"] for row in facts.rows), default=-1) + 1
    ended = [event["kind"] for event in facts.events if event["kind"] in ("done", "stopped", "asked to end", "started")]
    state = {"done": "done", "stopped": "stopped by a guard", "asked to end": "ended early, goes on"}
    said = "done" if facts.result is not None else state.get(ended[-1] if ended else "", "running, or killed")
    found = [Tile(said, f"{steps} rows of metrics", _duration(facts.times.get("seconds", 0)) + " in all sessions")]
    trouble = Counter(event["kind"] for event in facts.events if event["kind"] in TROUBLE)
    found.append(Tile(str(sum(trouble.values())), "alarms", ", ".join(f"{n} {kind}" for kind, n in trouble.items()) or "none"))
    for name in [name for name in FIRST if name in _names(facts.rows)][:4]:
        x, y = column(facts.rows, name)
        words = page.visible(name).replace("/", " ").replace("_", " ")
        found.append(Tile(f"{y[-1]:.4g}", words, f"from {y[0]:.4g} at step {x[0]:g}, now step {x[-1]:g}"))
    return [Tiles(found)]


def troubles(facts: Facts) -> list[Block]:
    """Alarms and events; saves are only counted."""
    if not facts.events:
        return []
    kinds = Counter(event["kind"] for event in facts.events)
    told = [event for event in facts.events if event["kind"] != "saved"]
    bad = [event for event in told if event["kind"] in TROUBLE]
    blocks: list[Block] = [Heading("Alarms and events")]
    if bad:
        blocks.append(_table_of(bad[:20]))
        if len(bad) > 20:
            blocks.append(Paragraph(f"The first 20 of {len(bad)}."))
    else:
        blocks.append(Paragraph("No alarm, no update left out, no save that failed."))
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return [*blocks, Folded(f"All events: {counts}", [_table_of(told[-EVENTS:])])]


def _table_of(events: Sequence[Row]) -> Table:
    own = ("number", "time", "seconds", "pid", "kind", "step")
    rows = []
    for event in events:
        rest = "; ".join(
            f"{k}: {v if isinstance(v, str) else json.dumps(v)}" for k, v in event.items() if k not in own and v != []
        )
        when = str(event.get("time", ""))[:19].replace("T", " ")
        rows.append([f"{event['kind']}: {rest}" if rest else str(event["kind"]), str(event.get("step", "")), when])
    return Table(["event", "step", "UTC"], [[page.visible(cell) for cell in row] for row in rows])


def curves(facts: Facts) -> list[Block]:
    """Every metric that moved: the first ones open, the others folded by what they begin with."""
    moved: dict[str, tuple[list[float], list[float]]] = {}
    still = []
    for name in _names(facts.rows):
        x, y = column(facts.rows, name)
        if len(set(y)) > 1 and len(x) > 1:
            moved[name] = (x, y)
        else:
            still.append([page.visible(name), f"{y[-1]:.6g}"])
    if not moved and not still:
        return []
    marks = sorted({event["step"] for event in facts.events if event["kind"] in TROUBLE and "step" in event})
    first = [name for name in FIRST if name in moved]
    groups: dict[str, list[str]] = {}
    for name in moved:
        if name not in first:
            groups.setdefault(name.partition("/")[0], []).append(name)
    note = "Red lines: steps with an alarm." if marks else ""
    blocks: list[Block] = [Heading("Curves")]
    if first:
        blocks.append(Figures([_curve(name, *moved[name], marks) for name in first], note))
    for group, names in sorted(groups.items()):
        inside = Figures([_curve(name, *moved[name], marks) for name in names])
        blocks.append(Folded(f"{group} ({len(names)})", [inside]))
    if still:
        blocks.append(Folded(f"never moved ({len(still)})", [Table(["metric", "value"], still)]))
    return blocks


def _curve(name: str, x: list[float], y: list[float], marks: Sequence[int]) -> Figure:
    if len(x) < 100:
        series = [plots.Series(name, x, y, marks=len(x) < 12)]
    else:
        (raw_x, raw), (mean_x, mean) = thin(x, y), thin(x, plots.smooth(y))
        series = [plots.Series(name, raw_x, raw, faint=True), plots.Series(name, mean_x, mean)]
    return Figure(name.replace("/", "_"), plots.lines(page.visible(name).replace("$", r"\$"), series, "step", marks=marks[:50]))


def thin(x: list[float], y: list[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """A curve with at most so many points: of each run of neighbours the lowest and the highest, so that no spike is lost."""
    if len(x) <= points:
        return x, y
    kept = []
    for part in np.array_split(np.arange(len(x)), points // 2):
        values = [y[i] for i in part]
        kept += sorted({int(part[int(np.argmin(values))]), int(part[int(np.argmax(values))])})
    return [x[i] for i in kept], [y[i] for i in kept]


def column(rows: Iterable[Row], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, where it is a finite number."""
    found = [(float(row["step"]), float(row[name])) for row in rows if _is_number(row.get(name))]
    return [x for x, _ in found], [y for _, y in found]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _names(rows: Iterable[Row]) -> list[str]:
    return sorted({name for row in rows for name, value in row.items() if name != "step" and _is_number(value)})


def rollouts(facts: Facts, steps: Sequence[int] = ()) -> list[Block]:
    """Sampled answers token by token, the newest first.

    Raises:
        ValueError: a step of which there are none.
    """
    there = sorted({row["step"] for row in facts.samples})
    if missing := [step for step in steps if step not in there]:
        kept = ", ".join(map(str, there)) or "none; scripts that sample answers keep some"
        raise ValueError(f"steps {missing}: no rollouts of them were kept; there are those of {kept}")
    if not there:
        return []
    spread = [there[round(i * (len(there) - 1) / max(1, SHOWN - 1))] for i in range(SHOWN)]
    chosen = sorted(set(steps) or set(spread), reverse=True)
    shown = [row for row in facts.samples if row["step"] in chosen]
    names = {key: name for key, name in NUMBERS.items() if any(key in row for row in shown)}
    scale = {name: _scale([x for row in shown for x in row.get(key, ())]) for key, name in names.items()}
    groups = {}
    for step in chosen:
        rows = [row for row in shown if row["step"] == step]
        scores = [row["score"] for row in rows if row["score"] is not None]
        mean = f", mean score {sum(scores) / len(scores):.3g}" if scores else ""
        groups[f"step {step}: {len(rows)} rollouts{mean}"] = [_rollout(row, names) for row in rows]
    note = f"From {len(there)} steps of the run; four rows a step, none picked. Colours of all steps have one scale."
    return [Heading("Rollouts, token by token"), Paragraph(note), HeatMaps(groups, scale)]


def _scale(values: Sequence[float | None]) -> float:
    """What is fully coloured: the size that 2 % of the numbers other than 0 pass."""
    sizes = [abs(value) for value in values if value]
    return float(np.quantile(sizes, 0.98)) if sizes else 0.0


def _rollout(row: Row, names: Mapping[str, str]) -> Rollout:
    said = [f"score {_number(row['score'])}"]
    if "kl" in row:
        said.append(f"KL {sum(x for x in row['kl'] if x is not None):.3g} nats")
    said.append(
        f"{row['length']} tokens" + (f", the first {len(row['tokens'])} shown" if row["length"] > len(row["tokens"]) else "")
    )
    said.append("ended by itself" if row["finished"] else "cut off")
    if not row["weight"]:
        said.append("**no score could be had: left out of the update**")
    numbers = {name: row[key] for key, name in names.items() if key in row}
    whole = row["finished"] and row["length"] == len(row["tokens"])
    return Rollout(row["prompt"], row["tokens"], numbers, " \u00b7 ".join(said), whole)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def times(facts: Facts) -> list[Block]:
    """Where the time went, by stage, over all rows."""
    spent: Counter[str] = Counter()
    for row in facts.rows:
        for name, value in row.items():
            if name.startswith("time/") and name != "time/step" and _is_number(value):
                spent[name[5:]] += value
    total = sum(spent.values())
    if not total:
        return []
    parts = [
        (stage, seconds / total, f"{_duration(seconds)} \u00b7 {100 * seconds / total:.1f} %")
        for stage, seconds in spent.most_common()
        if seconds > 0
    ]
    steps = [row["time/step"] for row in facts.rows if _is_number(row.get("time/step"))]
    note = f"{_duration(total)} in {len(steps)} rows, the median row {_duration(float(np.median(steps)))}."
    return [Heading("Where the time went"), Paragraph(note), Shares(parts)]


def about(facts: Facts) -> list[Block]:
    """Settings, environment, commit, result."""
    blocks: list[Block] = [Heading("What ran")]
    found = facts.environment
    commit = found.get("commit")
    if commit:
        changed = " with changes that were not committed" if commit.endswith("+") else ""
        blocks.append(Paragraph(f"Commit `{page.visible(commit.rstrip('+'))}`{changed}."))
    rows = []
    for name, value in found.items():
        if name != "commit":
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            text = " ".join(map(str, text)) if isinstance(text, list) else str(text)
            rows.append(f"{name}: {text}")
    blocks.append(Folded("Environment", page.visible("\n".join(rows), breaks=True)))
    blocks.append(Folded("Settings", page.visible(facts.settings, breaks=True)))
    if facts.result is not None:
        blocks.append(Folded("Result", page.visible(json.dumps(facts.result, indent=1, ensure_ascii=False), breaks=True)))
    return blocks


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return str(datetime.timedelta(seconds=round(seconds)))
