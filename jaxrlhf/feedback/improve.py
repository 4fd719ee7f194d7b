"""Whether a candidate may take the place of the policy that is served: the gates, each a number with its limits.

One gate asks for proof that the candidate is better: the judge's win rate over the policy that is served, of which the lower
end of the 95 % interval counts. The others refuse on proof of harm, or where a plain number leaves its range. What must be
better is measured against the policy that is served; what must not drift is measured against round 0's, so that many small
steps cannot add up unseen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxrlhf.evaluation.win_rate import Interval

DRAWS = 2000  # bootstrap samples


@dataclasses.dataclass(frozen=True)
class Limits:
    """What each gate asks for; None leaves it open."""

    win_rate: float | None = 0.5  # least: lower end of the judge's win rate over the policy that is served
    kl: float | None = 15.0  # most: nats an answer between the candidate and round 0's policy
    shortest: float | None = 0.5  # least: tokens of an answer, over those of round 0's policy
    longest: float | None = 2.0  # most: the same
    distinct_2: float | None = 0.6  # least: distinct-2 of the answers, over that of round 0's policy
    new_choices: float | None = 0.5  # least: share of choices new since the served round that its reward model foretells
    each_labeler: float | None = 0.5  # least: upper end of it, of the labeler and round where it is lowest
    held_out_choices: float | None = 0.0  # least: upper end of what the refreshed reward model gains on held-out choices
    earlier_choices: float | None = 0.0  # least: the same on those that the served round had already
    gold_choices: float | None = 0.0  # least: the same on gold pairs
    people_on_gold: float | None = 0.6  # least: share of the new choices on gold pairs that are right
    policy_choices: float | None = (
        0.5  # least: upper end of the share of held-out choices that the policy's own preference says
    )
    regression: int | None = 0  # most: regression prompts whose answer is judged below what its row expects
    few: int = 20  # choices; a gate on fewer says nothing

    def __post_init__(self):
        for name in ("win_rate", "new_choices", "each_labeler", "people_on_gold", "policy_choices"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"gates.{name}={value} is a share: give a number in [0, 1], or None to leave the gate open")
        if self.few < 2:
            raise ValueError(f"gates.few={self.few}: an interval needs at least 2 choices")


class Gate(NamedTuple):
    """A number and where it may lie."""

    name: str
    measured: float | None  # None: too little to measure it on
    least: float | None
    most: float | None
    says: str  # what the number is, with its interval

    @property
    def passed(self) -> bool:
        """Whether the number lies where it may; one that is not a number does not, one that could not be had does."""
        if self.measured is None or (self.least is None and self.most is None):
            return True
        return (self.least is None or self.measured >= self.least) and (self.most is None or self.measured <= self.most)

    def plain(self) -> dict[str, Any]:
        """As the manifest of a round has it."""
        return self._asdict() | {"passed": self.passed}


class Rows(NamedTuple):
    """A number a row, and of what prompt each is: those of one prompt are not independent."""

    values: Float[np.ndarray, " n"]
    groups: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of a candidate. A right choice is 1, a wrong one 0, equal scores are 1/2; a gain is the difference."""

    wins: Rows  # judge's outcomes over the served policy: 1, 1/2, 0 of each held-out prompt
    kl: float  # nats an answer to round 0's policy
    length: float  # tokens of an answer, over round 0's
    distinct_2: float  # over round 0's
    new_choices: Rows  # right by the served round's reward model, which has seen none of them
    held_out_choices: Rows  # gain of the refreshed reward model over the served round's
    earlier_choices: Rows  # the same, of choices that the served round had
    gold_choices: Rows  # the same, of gold pairs
    people_on_gold: Rows  # right
    policy_choices: Rows  # held-out choices, right by the candidate's own preference
    by_labeler: Mapping[str, Rows]  # `new_choices` of each labeler that came between two rounds, by a name of both
    fallen: int | None = None  # regression prompts judged below what is expected; None: there are none


def bootstrap(rows: Rows, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean with its 95 % interval: percentiles over bootstrap samples of the groups, whole groups at a time.

    Source: Efron 1979; resampling of clusters, Davison and Hinkley 1997, section 3.8.

    Raises:
        ValueError: no row, or not one group a row.
    """
    values = np.asarray(rows.values, np.float64)
    if not len(values) or len(values) != len(rows.groups):
        raise ValueError(f"{len(values)} values of {len(rows.groups)} groups: a mean needs at least one, each of a group")
    names, index = np.unique(np.asarray(rows.groups), return_inverse=True)
    total, count = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(0, len(names), (draws, len(names)))
    low, high = np.quantile(total[drawn].sum(axis=1) / count[drawn].sum(axis=1), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def gates(measured: Measured, limits: Limits) -> list[Gate]:
    """Every gate, in the order in which they are reported."""
    wins = bootstrap(measured.wins)
    found = [Gate("win_rate", wins.low, limits.win_rate, None, f"lower end; judge's win rate {_told(wins)}")]
    found.append(Gate("kl", measured.kl, None, limits.kl, "nats an answer to round 0's policy"))
    found.append(Gate("length", measured.length, limits.shortest, limits.longest, "tokens an answer, over round 0's"))
    found.append(Gate("distinct_2", measured.distinct_2, limits.distinct_2, None, "over round 0's"))
    found.append(_of_choices("new_choices", measured.new_choices, limits, "foretold by the served reward model", upper=False))
    found.append(_lowest(measured.by_labeler, limits))
    found.append(_of_choices("people_on_gold", measured.people_on_gold, limits, "of gold answered rightly", upper=False))
    for name, what in (
        ("held_out_choices", "gain of the reward model"),
        ("earlier_choices", "the same, known to the served round"),
        ("gold_choices", "the same, on gold pairs"),
        ("policy_choices", "said by the policy's own preference"),
    ):
        found.append(_of_choices(name, getattr(measured, name), limits, what, upper=True))
    fallen = None if measured.fallen is None else float(measured.fallen)
    found.append(Gate("regression", fallen, None, limits.regression, "prompts judged below what is expected"))
    return found


def _of_choices(name: str, rows: Rows, limits: Limits, what: str, upper: bool) -> Gate:
    """A mean; with `upper` one that is too low only where the upper end of its interval is: on proof."""
    least, count = getattr(limits, name), len(rows.values)
    if count < limits.few:
        return Gate(name, None, least, None, f"only {count} choices: says nothing")
    found = bootstrap(rows)
    told = f"{what}, {_told(found)} of {count}"
    return Gate(name, found.high, least, None, f"upper end; {told}") if upper else Gate(name, found.rate, least, None, told)


def _lowest(by_labeler: Mapping[str, Rows], limits: Limits) -> Gate:
    """The labeler and round of the lowest share, on proof: many honest choices do not hide the others."""
    name, least = "each_labeler", limits.each_labeler
    enough = {who: bootstrap(rows) for who, rows in by_labeler.items() if len(rows.values) >= limits.few}
    if not enough:
        return Gate(name, None, least, None, f"nobody has {limits.few} new choices: says nothing")
    who = min(enough, key=lambda who: enough[who].high)
    return Gate(name, enough[who].high, least, None, f"upper end; the same of {who}, {_told(enough[who])}")


def _told(found: Interval) -> str:
    return f"{found.rate:.3f} [{found.low:.3f}, {found.high:.3f}]"


def outcomes(margins: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """1 where the chosen answer stands higher, 0 where it stands lower, 1/2 where both stand alike; NaN stays.

    The margin of a reward model is score(chosen) - score(rejected); that of a policy is the difference of
    log policy - log reference, its implicit reward. Source: Rafailov et al. 2023, equation 5.
    """
    return np.where(np.isnan(margins), np.nan, (margins > 0) + 0.5 * (margins == 0))


def due(new: int, minutes: int | float, choices: int, every_minutes: int | float | None) -> bool:
    """Whether a round begins: by schedule when so many minutes have passed and anything is new, else at enough new choices."""
    return new >= choices if every_minutes is None else new > 0 and minutes >= every_minutes


def table(round_: Mapping[str, Any]) -> str:
    """What a round's manifest says of its gates, as Markdown."""
    choices, number = round_["snapshot"], round_["round"]
    refused = [gate["name"] for gate in round_["gates"] if not gate["passed"]]
    verdict = f"refused by {', '.join(refused)}" if refused else "passed"
    lines = [
        f"round {number}, from round {round_['served']}: {verdict}",
        "",
        f"{choices['choices']} choices ({choices['new']} new, {choices['held_out']} held out; {choices['unreadable']} more are "
        f"texts that no file can hold); {round_['algorithm']}, reference: policy of round {round_['reference']['round']}",
        "",
        "| gate | measured | limit | | |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    for gate in round_["gates"]:
        limit = [f">= {gate['least']:g}"] if gate["least"] is not None else []
        limit += [f"<= {gate['most']:g}"] if gate["most"] is not None else []
        shown = "-" if gate["measured"] is None else f"{gate['measured']:.3f}"
        word = "NO" if not gate["passed"] else "passed" if gate["measured"] is not None else "not measured"
        lines.append(f"| {gate['name']} | {shown} | {', '.join(limit) or 'open'} | {word} | {gate['says']} |")
    for name, (right, said) in sorted(round_.get("labelers", {}).items()):
        lines.append(
            f"| {name} | {right / said:.3f} | | | labeler: new choices foretold by the served reward model, of {said:g} |"
        )
    for name, (before, after) in round_.get("accuracy", {}).items():
        lines.append(f"\nheld-out choices told rightly, {name.replace('_', ' ')}: {before:.3f} before, {after:.3f} now")
    return "\n".join(lines) + "\n"
