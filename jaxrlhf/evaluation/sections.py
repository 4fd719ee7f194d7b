"""The parts of the report, each a function from results to blocks that is empty where its stage is absent."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from jaxrlhf.evaluation import findings, page, plots, trained
from jaxrlhf.evaluation.findings import Results, get
from jaxrlhf.evaluation.page import Block, Figure, Figures, Heading, Paragraph, Sample, Samples, Table, Tile, Tiles


def all_of(results: Results, rows: trained.Rows, about: Mapping[str, Any]) -> list[Block]:
    """The whole report in order."""
    return [
        *(Paragraph(text) for text in findings.verdict(results)),
        *tiles(results),
        *loop(results),
        *samples(results),
        *bars(results),
        *trained.language_model(results, rows),
        *trained.reward_model(results),
        *trained.policy(results, rows),
        *trained.policies(results),
        *trained.overoptimized(results),
        *second_round(results),
        *who(results),
        *source(results, about),
    ]


def tiles(results: Results) -> list[Block]:
    """The figures to be seen first."""
    found = []
    tuned = get(results, "evaluate", "candidate") or {}
    for judge in ("vader", "textblob"):
        interval = get(tuned, "win_rate", judge)
        if interval is None:
            continue
        note = f"95 %: {100 * interval[1]:.1f} to {100 * interval[2]:.1f}"
        found.append(Tile(findings.percent(interval[0]), f"{findings.judge_name(judge)} prefers PPO", note))
    if tuned:
        found.append(Tile(f"{tuned['kl']:.1f} nats", "KL a response"))
    accuracy = get(results, "reward_model", "accuracy", "model")
    if accuracy:
        mean, ridge = (
            sum(who.values()) / len(who) for who in (accuracy, get(results, "reward_model", "accuracy", "ridge") or accuracy)
        )
        found.append(Tile(findings.percent(mean), "reward model, human pairs", f"ridge: {findings.percent(ridge)}"))
    bits = get(results, "pretrain", "bits_per_character")
    if bits is not None:
        found.append(Tile(f"{bits:.2f}", "bits per character"))
    if findings.seconds(results):
        found.append(
            Tile(
                findings.duration(findings.seconds(results)),
                "stages in all",
                f"{findings.duration(findings.seconds(results, 'cpu_seconds'))} of processor",
            )
        )
    return [Tiles(found)] if found else []


def loop(results: Results) -> list[Block]:
    """The picture of the loop with the time of each stage."""

    def note(*stages: str) -> str:
        times = [findings.duration(results[stage]["seconds"]) for stage in stages if get(results, stage, "seconds") is not None]
        return ", then ".join(times)

    grid = {
        "pretrain": (0, 0, "Pre-train"),
        "sft": (0, 1, "Fine-tune"),
        "reward_model": (1, 1, "Reward model"),
        "ppo": (2, 1, "PPO"),
        "evaluate": (2, 2, "Judge"),
        "sample_pairs": (2, 3, "Pairs of answers"),
        "label": (1, 3, "Choices"),
    }
    boxes = {
        stage: plots.Box(column, row, title, note(stage, f"{stage}_2"), inside=column > 0)
        for stage, (column, row, title) in grid.items()
        if stage in results
    }
    if not boxes:
        return []
    order = ["pretrain", "sft", "reward_model", "ppo", "evaluate", "sample_pairs", "label", "reward_model"]
    arrows = [(a, b) for a, b in itertools.pairwise(order) if a in boxes and b in boxes]
    said = ["First round: people's ratings of single texts"]
    if "label" in results:
        said.append("Second round: " + findings.who_chose(results).replace("`", ""))
    picture = plots.flow("The loop and the time of each stage", boxes, arrows, said)
    return [Figures([Figure("loop", picture, wide=True)])]


def samples(results: Results) -> list[Block]:
    """The first held-out prompts with every policy's answer."""
    first = get(results, "evaluate", "samples") or []
    later = {row["prompt"]: row["after"] for row in get(results, "evaluate_2", "samples") or []}
    shown = []
    for row in first:
        answers = [("fine-tuned", row["before"]), ("PPO", row["after"])]
        if row["prompt"] in later:
            answers.append(("PPO, second round", later[row["prompt"]]))
        shown.append(Sample(row["prompt"], answers))
    if not shown:
        return []
    note = "The first prompts of the held-out reviews, in the order of the evaluation; none was picked."
    return [Heading("Before and after"), Paragraph(note), Samples(shown)]


def bars(results: Results) -> list[Block]:
    """Every figure with its bar."""
    found = findings.bars(results)
    if not found:
        return []
    verdicts = {True: page.MET, False: page.MISSED, None: "\u2013"}
    table = Table(["figure", "here", "bar", ""], [[bar.name, bar.value, bar.bar, verdicts[bar.met]] for bar in found])
    small = any(bar.met is None for bar in found)
    note = (
        [Paragraph(f"A run judged on fewer than {findings.ENOUGH} prompts is too small for the bars marked \u2013.")]
        if small
        else []
    )
    return [Heading("Figures and their bars"), *note, table]


def second_round(results: Results) -> list[Block]:
    """The refreshed reward model against the first and the control, and what it did to the policy."""
    stages = (
        ("reward_model", "first"),
        ("reward_model_control", "control: ratings only"),
        ("reward_model_2", "second: ratings and choices"),
    )
    found = [(name, results[stage]) for stage, name in stages if get(results, stage, "accuracy")]
    if "reward_model_2" not in results or len(found) < 2:
        return []
    domains = list(found[0][1]["accuracy"]["model"])
    before = get(results, "reward_model_2", "choices", "accuracy_before")
    rows = []
    for name, result in found:
        choices = get(result, "choices", "accuracy") if name != "first" else before
        cells = [findings.percent(result["accuracy"]["model"][domain]) for domain in domains]
        rows.append([name, *cells, "" if choices is None else findings.percent(choices)])
    count = get(results, "reward_model_2", "choices", "held_out")
    table = Table(["reward model", *domains, "held-out choices" + (f" ({count})" if count else "")], rows)
    second, control = (get(results, stage, "candidate", "judges") for stage in ("evaluate_2", "evaluate_control"))
    first = get(results, "evaluate", "candidate", "judges")
    drawn = []
    if second and first:
        shown = {"first": first, "control": control, "second": second}
        groups = {
            findings.judge_name(judge): {name: by[judge] for name, by in shown.items() if by and judge in by}
            for judge in second
        }
        drawn = [Figures([Figure("second_round", plots.bars("Judges' mean after each round", groups, percent=False))])]
    note = "PPO starts from the fine-tuned model again, against the refreshed reward model. "
    if get(results, "label", "labeler") != "human":
        note += "VADER made the choices here, so it is no outside judge of this round: TextBlob is."
    return [Heading("Second round"), *drawn, table, Paragraph(note.strip())]


def who(results: Results) -> list[Block]:
    """Who made the judgements that the loop learned from."""
    said = []
    if "reward_model" in results:
        said.append(
            "**First round:** people. The pairs are made from individual people's ratings of single texts (the human_sentiment "
            "data), 15 or more raters a text; no one compared two texts."
        )
    label = get(results, "label")
    if label is not None:
        human = label.get("labeler") == "human"
        how = (
            "a person at the terminal chose"
            if human
            else "**not people**, a simulated person chose: the answer that VADER finds more positive"
        )
        noise = (
            f", with {findings.percent(label['noise'], 0)} errors on purpose"
            if not human and label.get("noise") is not None
            else ""
        )
        counts = ", ".join(f"{count} {word.replace('_', ' ')}" for word, count in sorted(label.get("choices", {}).items()))
        said.append(f"**Second round:** {how}{noise} (`{label.get('name', '')}`: {counts}).")
        if not human:
            said.append("Choose yourself with `--labeler human`.")
    return [Heading("Who chose"), Paragraph(" ".join(said))] if said else []


def source(results: Results, about: Mapping[str, Any]) -> list[Block]:
    """Command, machine, versions, and the time of each stage."""
    lines = []
    if about.get("command"):
        lines.append(f"Command: `{about['command']}`" + (f", seed {about['seed']}." if about.get("seed") is not None else "."))
    machine = about["machine"]
    lines.append(f"Machine: {machine['cores']} cores, {machine['cpu'] or 'unknown processor'}, {machine['system']}.")
    lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in about["versions"].items()) + ".")
    rows = []
    for stage, result in results.items():
        if "seconds" in result:
            rows.append([stage, f"{result['seconds']:.1f}", f"{result.get('cpu_seconds', 0):.1f}"])
    if rows:
        total = [f"{sum(result.get(name, 0) for result in results.values()):.1f}" for name in ("seconds", "cpu_seconds")]
        rows.append(["all", *total])
    table = [Table(["stage", "seconds", "processor seconds"], rows)] if rows else []
    return [Heading("Where the numbers come from"), *(Paragraph(line) for line in lines), *table]
