"""The parts of the report on what was trained: language model, reward model, policy, and what pressing it too far does.

Each is a function from results to blocks that is empty where its stage is absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.evaluation import findings, overoptimization, plots
from jaxrlhf.evaluation.findings import JUDGES, Results, get
from jaxrlhf.evaluation.page import Block, Figure, Figures, Heading, Paragraph, Sample, Samples, Table

Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # stage -> rows of metrics.jsonl

ROUNDS = (("ppo", "first round"), ("ppo_control", "control"), ("ppo_2", "second round"))
POLICIES = (
    ("evaluate", "baseline", "fine-tuned"),
    ("evaluate", "baseline_again", "drawn again"),
    ("evaluate", "candidate", "PPO"),
    ("evaluate_control", "candidate", "control"),
    ("evaluate_2", "candidate", "second round"),
)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, where it was logged."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [float(step) for step, _ in found], [float(value) for _, value in found]


def _trace(name: str, rows: Sequence[Mapping[str, Any]], metric: str, colour: int = 0) -> list[plots.Series]:
    """A metric over the steps: the raw values faint behind their moving mean where there are many."""
    x, y = _column(rows, metric)
    if len(x) < 2:
        return []
    if len(x) < 100:
        return [plots.Series(name, x, y, colour)]
    return [plots.Series(name, x, y, colour, faint=True), plots.Series(name, x, plots.smooth(y), colour)]


def language_model(results: Results, rows: Rows) -> list[Block]:
    """Loss curves of pre-training and fine-tuning."""
    drawn = []
    for stage, title in (("pretrain", "Pre-training loss, nats a token"), ("sft", "Fine-tuning loss, nats a token")):
        series = _trace(title, rows.get(stage, []), "loss/lm")
        if series:
            drawn.append(Figure(f"{stage}_loss", plots.lines(title, series, "step", clip=0.01)))
    said = []
    if get(results, "pretrain", "bits_per_character") is not None:
        said.append(f"Held-out reviews: {results['pretrain']['bits_per_character']:.3f} bits per character.")
    before, after = (get(results, "sft", name) for name in ("nll_per_token_before", "nll_per_token"))
    if before is not None and after is not None:
        said.append(
            "Fine-tuning teaches where a response stops: on held-out responses "
            f"{before:.3f} nats a token before, {after:.3f} after."
        )
    blocks = [*([Figures(drawn)] if drawn else []), *([Paragraph(" ".join(said))] if said else [])]
    return [Heading("Language model"), *blocks] if blocks else []


def reward_model(results: Results) -> list[Block]:
    """Accuracy on held-out human pairs beside the baselines', and calibration."""
    accuracy = get(results, "reward_model", "accuracy")
    if not accuracy:
        return []
    names = {"model": "reward model", "ridge": "ridge", "vader": "VADER", "model_and_ridge": "model + ridge"}
    domains = list(accuracy["model"])
    groups = {domain: {names.get(who) or who: by[domain] for who, by in accuracy.items() if domain in by} for domain in domains}
    floor = min(0.5, *(value for group in groups.values() for value in group.values()))
    drawn = [Figure("reward_accuracy", plots.bars("Human pairs ordered rightly, % (bars from 50)", groups, floor))]
    table = get(results, "reward_model", "calibration", "table") or []
    if len(table) > 1:
        x, y = [row["confidence"] for row in table], [row["accuracy"] for row in table]
        series = [
            plots.Series("reward model", x, y, 0, marks=True),
            plots.Series("as sure as right", [0.5, 1.0], [0.5, 1.0], 3),
        ]
        drawn.append(Figure("reward_calibration", plots.lines("Right, by how sure the reward model is", series, "confidence")))
    margins = get(results, "reward_model", "accuracy_by_margin") or []
    if len(margins) > 1:
        x, y = [row["margin"] for row in margins], [row["accuracy"] for row in margins]
        series = [plots.Series("reward model", x, y, 0, marks=True)]
        title = "Right, by how far people tell two texts apart"
        drawn.append(Figure("reward_margin", plots.lines(title, series, "rating gap above")))
    note = (
        "All pairs of one domain whose mean ratings differ by half a point or more; nobody saw these texts side by side: "
        "a pair is made of two texts that people rated one by one. The ridge reads words and word pairs and was fitted on the "
        "same texts as the reward model."
    )
    error = get(results, "reward_model", "calibration", "ece")
    if error is not None:
        note += f" Expected calibration error: {error:.3f}."
    length = get(results, "reward_model", "length_correlation")
    if length is not None:
        score, rating = length["score"], length["rating"]
        note += f" Correlation with the number of tokens: {score:.2f} of the score, {rating:.2f} of people's ratings."
    note += _drift(results)
    return [Heading("Reward model"), Figures(drawn), Paragraph(note)]


def _drift(results: Results) -> str:
    """What the reward model says of the policy's own samples, beside those it was normalised on."""
    before, after = (get(results, "evaluate", "reward_drift", who) for who in ("baseline", "candidate"))
    if before is None or after is None:
        return ""
    fine, tuned = (
        f"mean {row['mean']:.2f}, deviation {row['std']:.2f}, "
        f"{findings.percent(row['accuracy'].get('textblob', float('nan')))} of the pairs ordered as by TextBlob"
        for row in (before, after)
    )
    return f" Drift of the score on held-out prompts: the fine-tuned model's samples {fine}; PPO's {tuned}."


def policy(results: Results, rows: Rows) -> list[Block]:
    """PPO's course, and judges against the distance travelled."""
    metrics = (
        ("reward/score", "Reward model's score"),
        ("policy/kl_ref", "KL to the fine-tuned model, nats a response"),
        ("rollout/length", "Response length, tokens"),
        ("policy/entropy", "Entropy, nats a token"),
    )
    drawn = []
    for metric, title in metrics:
        series = [one for i, (stage, name) in enumerate(ROUNDS) for one in _trace(name, rows.get(stage, []), metric, i)]
        if series:
            drawn.append(
                Figure(metric.replace("/", "_"), plots.lines(title, series, "iteration", zero=metric == "policy/kl_ref"))
            )
    blocks: list[Block] = [Figures(drawn)] if drawn else []
    curve = findings.curve(results, "ppo")
    if len(curve) > 1:
        nbest = overoptimization.curve([row for row in get(results, "evaluate", "best_of_n") or [] if row["n"] > 1])
        caption = "Held-out prompts. " + (
            "Diamonds: best of n answers of the fine-tuned model, by the same reward model." if nbest else ""
        )
        blocks.append(Figures(_distance("ppo", curve, nbest), caption.strip()))
    return [Heading("PPO"), *blocks] if blocks else []


def _distance(prefix: str, curve: Sequence[Mapping[str, Any]], nbest: Sequence[Mapping[str, Any]] = ()) -> list[Figure]:
    """Proxy and judges against the square root of the KL."""
    found = []
    wanted = (("proxy", "Reward model's score (proxy)", ["proxy"]), ("judges", "Judges' mean", ["vader", "textblob"]))
    for name, title, keys in wanted:
        series = []
        for i, key in enumerate(key for key in keys if all(key in row for row in curve)):
            label = JUDGES.get(key, "PPO")
            series.append(plots.Series(label, *_xy(curve, key), i, marks=True))
            if nbest and all(key in row for row in nbest):
                shown = [str(row["n"]) for row in nbest]
                best = "best of n" if key == "proxy" else f"{label}, best of n"
                series.append(plots.Series(best, *_xy(nbest, key), i, line=False, marks=True, labels=shown))
        if series:
            found.append(Figure(f"{prefix}_{name}_by_distance", plots.lines(title, series, "\u221aKL to the fine-tuned model")))
    return found


def _xy(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    return [float(row["sqrt_kl"]) for row in rows], [float(row[key]) for row in rows]


def policies(results: Results) -> list[Block]:
    """One column a policy, with every held-out figure."""
    found = [(name, row) for stage, which, name in POLICIES if (row := get(results, stage, which))]
    if not found:
        return []
    start, tuned = ([one for one in found if (one[1].get("kl") == 0) == same] for same in (True, False))
    nbest = []
    for row in get(results, "evaluate", "best_of_n") or []:
        if row["n"] > 1:
            means = {judge: row[judge] for judge in JUDGES if judge in row}
            wins = {judge: [row[f"win_{judge}"]] for judge in JUDGES if f"win_{judge}" in row}
            nbest.append((f"best of {row['n']}", row | {"judges": means, "win_rate": wins}))
    return [Heading("Policies side by side"), _columns([*start, *nbest, *tuned]), Paragraph(POLICIES_NOTE)]


POLICIES_NOTE = (
    "The same held-out prompts for all; wins over the fine-tuned model's answers, ties half, Wilson 95 % intervals. The KL of "
    "best-of-n is an upper bound. Distinct-n falls with the number of texts. A round's score is by its own reward model."
)


def _columns(found: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """The table of policies; a cell is empty where a policy lacks the figure."""

    def line(name: str, form: str, *path: str | int) -> list[str]:
        values = [get(row, *path) for _, row in found]
        return [
            name,
            *(
                "" if value is None else form.format(100 * value if "%" in name else value).replace("-", "\u2212")
                for value in values
            ),
        ]

    rows = [line("KL, nats a response", "{:.2f}", "kl"), line("reward model's score", "{:.2f}", "proxy")]
    for judge in found[0][1].get("judges", {}):
        name = findings.judge_name(judge)
        low, high = (line("%", "{:.1f}", "win_rate", judge, i) for i in (1, 2))
        ends = [f"{a}\u2013{b}" if a else "" for a, b in zip(low[1:], high[1:], strict=True)]
        rows += [line(f"{name}, mean", "{:.3f}", "judges", judge), line(f"{name} wins, %", "{:.1f}", "win_rate", judge, 0)]
        rows.append(["\u2003interval", *ends])
    rows += [line("length, tokens", "{:.1f}", "length"), line("entropy, nats a token", "{:.2f}", "entropy")]
    rows += [line("ends by itself, %", "{:.1f}", "eos_rate"), line("distinct-1", "{:.3f}", "distinct_1")]
    rows += [line("distinct-2", "{:.3f}", "distinct_2"), line("distinct texts, %", "{:.1f}", "distinct_texts")]
    rows.append(line("prompts", "{:.0f}", "prompts"))
    return Table(["", *(name for name, _ in found)], [row for row in rows if any(row[1:])])


def overoptimized(results: Results) -> list[Block]:
    """PPO without the KL penalty: proxy, judges and diversity against the distance, for each reward model that was pressed."""
    curves = findings.overoptimized(results)
    if not curves:
        return []
    blocks: list[Block] = [Heading("Over-optimisation: PPO without the KL penalty")]
    for stage, pressed in findings.PRESSED.items():
        if pressed in curves:
            blocks += _pressed(results, stage, pressed, curves[pressed])
    advice = "VADER adds up word scores, so praise stuffed into a text saturates it: never read it alone."
    return [*blocks, Paragraph(f"{advice} TextBlob averages the words that it knows: it sees neither repetition nor grammar.")]


def _pressed(results: Results, stage: str, pressed: str, curve: list[dict[str, Any]]) -> list[Block]:
    drawn = _distance(stage, curve)
    if all("distinct_2" in row for row in curve):
        series = [plots.Series("distinct-2", *_xy(curve, "distinct_2"), 2, marks=True)]
        drawn.append(
            Figure(f"{stage}_distinct", plots.lines("Distinct-2", series, "\u221aKL to the fine-tuned model", zero=True))
        )
    said = [f"Pressed: {pressed}."]
    for judge in ("textblob", "vader"):
        if judge in curve[0]:
            peak = overoptimization.peak_and_drop(curve, judge)
            start, low = (curve[i]["sqrt_kl"] for i in (peak.index, peak.low_index))
            fall = (
                f"peaks at \u221aKL {start:.1f} ({peak.peak:.2f}) and falls {findings.percent(peak.drop, 0)} to {peak.low:.2f} "
                f"at {low:.1f}, while the proxy goes {peak.proxy_rise:+.2f}; at the end it is {peak.final:.2f}"
            )
            said.append(
                f"{JUDGES[judge]} {fall if peak.drop > 0.005 else f'does not turn down ({peak.final:.2f} at the end)'}."
            )
    shown = [
        Sample(row["prompt"], [("fine-tuned", row["before"]), ("no KL penalty", row["after"])])
        for row in get(results, stage, "samples") or []
    ]
    return [Figures(drawn), Paragraph(" ".join(said)), *([Samples(shown)] if shown else [])]
