"""What a run's figures say: each against its bar, and the verdict in words. The figures' names are listed in `report.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxrlhf.evaluation import overoptimization

Number = int | float
Results = Mapping[str, Mapping[str, Any]]  # stage -> result.json

MAIN = ("pretrain", "sft", "reward_model", "ppo", "evaluate", "sample_pairs", "label", "reward_model_2", "ppo_2", "evaluate_2")
PRESSED = {  # stages of PPO without the KL penalty, and what each was trained against
    "overoptimize": "the reward model",
    "overoptimize_narrow": "a reward model of movie ratings alone",
}
JUDGES = {"vader": "VADER", "textblob": "TextBlob", "ridge": "ridge"}
ENOUGH = 384  # held-out prompts from which on the bars mean something
DROP = 0.15  # fall of the outside judge from its peak that counts as over-optimisation


def get(results: Any, *path: str | int) -> Any:
    """What stands at `path`, or None where a part of it is absent."""
    for key in path:
        try:
            results = results[key]
        except (KeyError, IndexError, TypeError):
            return None
    return results


def judge_name(judge: str) -> str:
    """The name of a judge as a reader knows it."""
    return JUDGES.get(judge) or judge


def percent(share: Number, digits: int = 1) -> str:
    """A share in [0, 1] as text in percent."""
    return f"{100 * share:.{digits}f} %"


def share(interval: list[Number] | None) -> str:
    """A share with its 95 % interval."""
    return "" if interval is None else f"{percent(interval[0])} ({100 * interval[1]:.1f} to {100 * interval[2]:.1f})"


def listed(parts: Sequence[str], last: str = " and ") -> str:
    """Parts divided by commas, the last one by `last`."""
    return last.join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def duration(seconds: Number) -> str:
    """Seconds as text, in minutes from two minutes on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


class Bar(NamedTuple):
    """A figure, what it is to reach, and whether it does; None where the run is too small for the bar to apply."""

    name: str
    value: str
    bar: str
    met: bool | None


def held_out_prompts(results: Results) -> int:
    """Prompts on which the policies were judged; 0 before that stage."""
    return get(results, "evaluate", "candidate", "prompts") or 0


def curve(results: Results, stage: str) -> list[dict[str, Any]]:
    """The held-out evaluations of a PPO stage: kl, sqrt_kl, proxy, judges, ... and `step`."""
    rows = get(results, stage, "curve") or []
    return overoptimization.curve([{key.removeprefix("held_out/"): value for key, value in row.items()} for row in rows])


def overoptimized(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The curves of PPO without the KL penalty, by what was pressed."""
    curves = {name: curve(results, stage) for stage, name in PRESSED.items()}
    return {name: rows for name, rows in curves.items() if len(rows) > 1}


def clearest_fall(results: Results) -> tuple[str, overoptimization.Peak] | None:
    """What was pressed where TextBlob fell most, and how; None without such runs."""
    peaks = [(name, overoptimization.peak_and_drop(rows, "textblob")) for name, rows in overoptimized(results).items()]
    return max(peaks, key=lambda found: found[1].drop, default=None)


def best_of(results: Results) -> dict[str, Any] | None:
    """The row of best-of-8, or of the largest n below; None without."""
    rows = [row for row in get(results, "evaluate", "best_of_n") or [] if 1 < row["n"] <= 8]
    return max(rows, key=lambda row: row["n"]) if rows else None


def seconds(results: Results, name: str = "seconds") -> Number:
    """Time of the loop's own stages, without the control and the over-optimisation."""
    return sum(get(results, stage, name) or 0.0 for stage in MAIN)


def bars(results: Results) -> list[Bar]:
    """Every figure that has a bar and is there."""
    small = held_out_prompts(results) < ENOUGH
    found: list[Bar] = []

    def add(name: str, value: Any, low: Number | None = None, high: Number | None = None, form: str = "{:.3g}") -> None:
        if value is None:
            return
        scale = 100 if "%" in form else 1
        ends = [None if end is None else form.format(scale * end) for end in (low, high)]
        text = f"{ends[0]} to {ends[1]}" if None not in ends else f"\u2265 {ends[0]}" if ends[0] else f"\u2264 {ends[1]}"
        met = (low is None or value >= low) and (high is None or value <= high)
        found.append(Bar(name, form.format(scale * value), text, None if small else bool(met)))

    rate = "{:.1f} %"
    add(
        "Language model: bits per character of held-out reviews",
        get(results, "pretrain", "bits_per_character"),
        high=1.80,
        form="{:.3f}",
    )
    for domain, low in (("movie", 0.795), ("product", 0.77), ("tweet", 0.82)):
        accuracy = get(results, "reward_model", "accuracy", "model", domain)
        add(f"Reward model: held-out pairs of people's ratings, {domain}", accuracy, low, form=rate)
    _policy_bars(results, add)
    _round_bars(results, add)
    for name, value, limit in (("wall", seconds(results), 600), ("processor", seconds(results, "cpu_seconds"), 1020)):
        if "evaluate_2" in results and not (small and name == "processor"):
            limit = 90 if small else limit
            found.append(
                Bar(f"Whole loop with its second round: {name} time", f"{value:.0f} s", f"\u2264 {limit} s", value <= limit)
            )
    return found


def _policy_bars(results: Results, add: Any) -> None:
    tuned, start = (get(results, "evaluate", who) for who in ("candidate", "baseline"))
    if tuned is None or start is None:
        return
    rate, nbest = "{:.1f} %", best_of(results)
    add("Held-out prompts judged", tuned["prompts"], ENOUGH, form="{:.0f}")
    for judge, low in (("vader", 0.80), ("textblob", 0.74)):
        add(f"PPO over fine-tuned: {JUDGES[judge]} win rate", get(tuned, "win_rate", judge, 0), low, form=rate)
    add("PPO: KL to the fine-tuned model, nats a response", tuned["kl"], high=9.0, form="{:.2f}")
    for name, low in (("length", 0.65), ("distinct_2", 0.75)):
        add(
            f"PPO: {name.replace('_', '-')} over the fine-tuned model's",
            tuned[name] / max(start[name], 1e-9),
            low,
            form="{:.2f}",
        )
    add("PPO: distinct texts", tuned["distinct_texts"], 0.98, form=rate)
    add("PPO: entropy, nats a token", tuned["entropy"], 1.9, form="{:.2f}")
    add("PPO: responses that end by themselves", tuned["eos_rate"], 0.95, form=rate)
    for judge in ("vader", "textblob"):
        win, other = get(tuned, "win_rate", judge, 0), get(nbest, f"win_{judge}")
        if nbest and win is not None and other is not None:
            kls = f"KL {tuned['kl']:.1f} against {nbest['kl']:.2f} nats"
            add(f"PPO over best-of-{nbest['n']}: {JUDGES[judge]} win rate ({kls})", win, other, form=rate)
    for judge in ("vader", "textblob"):
        again = get(results, "evaluate", "baseline_again", "win_rate", judge, 0)
        add(f"Sanity: fine-tuned against itself, {JUDGES[judge]}", again, 0.45, 0.55, form=rate)
    first = [row for row in curve(results, "ppo") if row["step"] == 0]
    add("Sanity: size of the KL before the first update", abs(first[0]["kl"]) if first else None, high=1e-3, form="{:.2g}")


def _round_bars(results: Results, add: Any) -> None:
    if (fall := clearest_fall(results)) is not None:
        peak = fall[1]
        add("Without KL penalty: TextBlob's largest fall from a peak", peak.drop, DROP, form="{:.1f} %")
        add("Without KL penalty: proxy's rise since that peak", peak.proxy_rise, 0.0, form="{:.2f}")
    choices = get(results, "label", "choices")
    if choices is not None:
        add("Second round: new choices", decided(choices), 2500, form="{:.0f}")
    second, control = (get(results, stage, "candidate") for stage in ("evaluate_2", "evaluate_control"))
    if second is not None:
        add("Second round: held-out prompts judged", second["prompts"], 768, form="{:.0f}")
    if second is not None and control is not None:
        name = "Second round: TextBlob mean, against a control without the choices"
        add(name, get(second, "judges", "textblob"), get(control, "judges", "textblob"), form="{:.3f}")
        add("Second round: KL apart from the control's, nats", abs(second["kl"] - control["kl"]), high=1.5, form="{:.2f}")


def decided(choices: Mapping[str, int]) -> int:
    """Choices that prefer one response: ties and skips train nothing."""
    return choices.get("left", 0) + choices.get("right", 0)


def verdict(results: Results) -> list[str]:
    """The summary, in sentences that follow the figures; one text a paragraph."""
    first = " ".join(text for text in (_what(results), _result(results)) if text)
    return [text for text in (first, _caution(results), _second(results)) if text]


def _what(results: Results) -> str:
    size, rows = get(results, "pretrain", "parameters"), curve(results, "ppo")
    parts = (
        [f"A language model of {size / 1e6:.1f} million parameters was trained from nothing on human chat and reviews"]
        if size
        else []
    )
    if "reward_model" in results:
        parts.append("a reward model learned from people's ratings of single texts")
    if rows:
        parts.append(f"PPO tuned the fine-tuned model against it for {rows[-1]['step']:.0f} iterations")
    return listed(parts, ", and ") + "." if parts else ""


def _result(results: Results) -> str:
    tuned = get(results, "evaluate", "candidate")
    if tuned is None or not tuned.get("win_rate"):
        return ""
    names = {**JUDGES, "ridge": "the ridge"}
    wins = [f"{names.get(judge, judge)} **{share(rate)}**" for judge, rate in tuned["win_rate"].items()]
    text = (
        f"How often judges that the training never saw find its text better than the fine-tuned model's, on {tuned['prompts']} "
        f"held-out prompts: {listed(wins)} (95 % intervals, ties half), at a KL of **{tuned['kl']:.1f} nats** a response."
    )
    if tuned["prompts"] < ENOUGH:
        return f"{text} **This is a small run: with fewer than {ENOUGH} prompts its figures show that the loop runs, no more.**"
    judged = bars(results)
    missed = [bar.name for bar in judged if bar.met is False]
    if not missed:
        return text + f" All {len(judged)} bars below are met."
    return text + f" **{len(judged) - len(missed)} of {len(judged)} bars below are met; missed: {'; '.join(missed)}.**"


def _caution(results: Results) -> str:
    parts = [_against_ridge(results)]
    tuned = get(results, "evaluate", "candidate")
    parts.append(_against_best_of(results))
    if (fall := clearest_fall(results)) is not None:
        pressed, peak = fall
        parts.append(
            f"Without the KL penalty {pressed} is exploited: its score still rises while TextBlob falls "
            f"{percent(peak.drop, 0)} from its peak."
            if peak.drop >= DROP and peak.proxy_rise > 0
            else "Without the KL penalty, over-optimisation did not show clearly in this run."
        )
    parts.append(
        "Read the samples: judges that add up words cannot tell good prose from a pile of praise, and a model this small holds "
        "grammar over a few words only."
    )
    return " ".join(part for part in parts if part) if tuned else ""


def _against_best_of(results: Results) -> str:
    tuned, nbest = get(results, "evaluate", "candidate"), best_of(results)
    wins = {judge: rate for judge in ("vader", "textblob") if (rate := get(nbest, f"win_{judge}")) is not None}
    if not tuned or not nbest or not wins or not tuned["kl"] > 0:
        return ""
    said = listed([f"{percent(rate)} by {JUDGES[judge]}" for judge, rate in wins.items()])
    text = (
        f"Taking the best of {nbest['n']} of the fine-tuned model's answers by the same reward model, without any training, "
        f"wins {said} at {nbest['kl']:.1f} nats or less; PPO's KL is {tuned['kl'] / nbest['kl']:.1f} times that"
    )
    tuned_wins = {judge: get(tuned, "win_rate", judge, 0) for judge in wins}
    cheaper = all(
        win is not None and (wins[judge] - 0.5) / nbest["kl"] > (win - 0.5) / tuned["kl"] for judge, win in tuned_wins.items()
    )
    return text + (", so per nat best-of-n is the cheaper way." if cheaper else ".")


def _against_ridge(results: Results) -> str:
    model, ridge = (get(results, "reward_model", "accuracy", who) for who in ("model", "ridge"))
    if not model or not ridge:
        return ""
    gaps = {domain: 100 * (model[domain] - ridge[domain]) for domain in model if domain in ridge}
    mean = sum(gaps.values()) / len(gaps)
    if min(gaps.values()) > 0:
        how = "beats"
    elif abs(mean) < 1.5:
        how = "is about as accurate as"
    else:
        how = "falls behind" if mean < 0 else "is on average ahead of"
    apart = ", ".join(f"{domain} {gap:+.1f}" for domain, gap in gaps.items()).replace("-", "\u2212")
    return f"The reward model {how} a bag-of-words ridge fitted on the same texts (points of accuracy apart: {apart})."


def _second(results: Results) -> str:
    second, first, control = (get(results, stage, "candidate") for stage in ("evaluate_2", "evaluate", "evaluate_control"))
    if not second:
        return ""
    mean = get(second, "judges", "textblob")
    text = f"After the second round ({who_chose(results)}) TextBlob's mean is **{mean:.3f}**" if mean is not None else ""
    before, apart = get(first, "judges", "textblob"), get(control, "judges", "textblob")
    if text and before is not None:
        text += f", from {before:.3f} after the first"
    if text and apart is not None:
        text += f" and {apart:.3f} in a control whose reward model was refreshed without the choices"
    return text + f", at a KL of {second['kl']:.1f} nats." if text else ""


def who_chose(results: Results) -> str:
    """In words, who chose between the policy's answers."""
    label = get(results, "label")
    if label is None:
        return "nobody has chosen yet"
    count = f"{decided(label.get('choices', {})):,} choices".replace(",", "\u202f")
    if label.get("labeler") == "human":
        return f"{count} made by a person, `{label.get('name', '')}`"
    errors = f" with {percent(label['noise'], 0)} errors" if label.get("noise") is not None else ""
    return f"{count} made by a simulated person, VADER{errors}"
