"""Plots as SVG text: line charts, grouped bars and the picture of the loop, in colours that follow light or dark.

Written here rather than by a plotting library because they must follow the page's colour scheme, stay sharp on a phone,
and cost neither a package nor seconds.
"""

from __future__ import annotations

import dataclasses
import html
import math
import textwrap
from collections.abc import Mapping, Sequence

Number = int | float

# Named colours: light, dark. `series-N` are told apart by colour-blind readers too, and every series has its own dash.
COLOURS = {
    "paper": ("#ffffff", "#15181d"),
    "card": ("#f6f7f9", "#1d2128"),
    "ink": ("#1b1f24", "#e6e8eb"),
    "soft": ("#5b6470", "#9aa4b0"),
    "rule": ("#d9dde3", "#343b45"),
    "good": ("#0b7a50", "#4cc38a"),
    "bad": ("#b42318", "#ff8a7a"),
    "series-0": ("#1f5fc4", "#74a9ff"),
    "series-1": ("#c4560a", "#f5a45d"),
    "series-2": ("#0d8568", "#4fd1ad"),
    "series-3": ("#7a3fd0", "#bb9cff"),
}
DASHES = ("", "6 3", "2 3", "9 3 2 3")


def style() -> str:
    """CSS that defines the colours as variables, for light and for dark."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def alone(svg: str) -> str:
    """The picture as a file of its own, with its colours and a background."""
    head, rest = svg.split(">", 1)
    return f'{head}><style>{style()}</style><rect width="100%" height="100%" fill="var(--paper)"/>{rest}\n'


@dataclasses.dataclass(frozen=True)
class Series:
    """One line (or, with `marks` alone, points) of a chart."""

    name: str
    x: Sequence[Number]
    y: Sequence[Number]
    colour: int = 0
    line: bool = True
    marks: bool = False
    faint: bool = False  # raw values behind a smoothed line; not in the legend
    labels: Sequence[str] = ()  # beside each mark


@dataclasses.dataclass(frozen=True)
class Level:
    """A dashed horizontal line with its name."""

    name: str
    y: Number


def smooth(values: Sequence[Number], share: Number = 0.03) -> list[Number]:
    """Mean over a centred window of `share` of the values, narrower at the ends so that it stays centred."""
    half, n = max(int(len(values) * share / 2), 0), len(values)
    result = []
    for i in range(n):
        reach = min(half, i, n - 1 - i)
        window = values[i - reach : i + reach + 1]
        result.append(sum(window) / len(window))
    return result


def ticks(low: Number, high: Number, count: int = 5) -> list[Number]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) from within [low, high]."""
    span = high - low
    power = 10 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_texts(values: Sequence[Number]) -> list[str]:
    """The ticks' texts, all with the decimals that the finest of them needs."""
    decimals = max((len(f"{value:.6f}".rstrip("0").partition(".")[2]) for value in values), default=0)
    return [f"{value + 0.0:.{decimals}f}".replace("-", "\u2212") for value in values]


def _text(
    x: Number, y: Number, text: str, anchor: str = "start", size: Number = 12, fill: str = "soft", weight: int = 400
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:.3g}" font-weight="{weight}"'
    return f'<text {place} fill="var(--{fill})">{html.escape(text)}</text>'


def _line(start: tuple[Number, Number], end: tuple[Number, Number], colour: str, width: Number = 1, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    place = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    return f'<line {place} stroke="var(--{colour})" stroke-width="{width}"{dashed}/>'


def _rect(x: Number, y: Number, wide: Number, tall: Number, fill: str, rest: str = "/>") -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="var(--{fill})" {rest}'


def _open(width: Number, height: Number, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{html.escape(title)}" font-family="system-ui, sans-serif">'
    )


def _range(values: Sequence[Number], zero: bool) -> tuple[Number, Number]:
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    pad = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return low if zero and low == 0 else low - pad, high + pad


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Where data land on the canvas."""

    left: Number
    top: Number
    right: Number
    bottom: Number
    x: tuple[Number, Number]
    y: tuple[Number, Number]

    def at(self, x: Number, y: Number) -> tuple[Number, Number]:
        return (
            self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left),
            self.bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.bottom - self.top),
        )


WIDTH, HEIGHT = 420, 285


def lines(
    title: str, series: Sequence[Series], x_label: str, levels: Sequence[Level] = (), zero: bool = False, clip: Number = 0.0
) -> str:
    """A line chart. Values that are not finite are left out; `clip` cuts that share of the highest values off the scale.

    Raises:
        ValueError: nothing finite to draw.
    """
    finite = []
    for one in series:
        points = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
        finite.append(dataclasses.replace(one, x=[x for x, _ in points], y=[y for _, y in points]))
    ys = sorted([y for one in finite for y in one.y])
    if not ys:
        raise ValueError(f"plot '{title}': no finite value to draw")
    ys = ys[: max(1, math.ceil(len(ys) * (1 - clip)))] + [level.y for level in levels]
    xs = [x for one in finite for x in one.x]
    x_range = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)
    if any(one.marks for one in finite):  # room for marks at the ends
        x_range = (x_range[0] - 0.03 * (x_range[1] - x_range[0]), x_range[1] + 0.05 * (x_range[1] - x_range[0]))
    named = [one for one in finite if not one.faint]
    rows = _legend_rows([one.name for one in named]) if len(named) > 1 else []
    frame = _Frame(48, 36 + 17 * len(rows), WIDTH - 14, HEIGHT - 42, x_range, _range(ys, zero))
    parts = [_open(WIDTH, HEIGHT, title), _text(14, 20, title, size=14, fill="ink", weight=600), *_axes(frame, x_label)]
    parts += _legend(rows, {one.name: one for one in named})
    for level in levels:
        _, y = frame.at(x_range[0], level.y)
        parts += [
            _line((frame.left, y), (frame.right, y), "soft", dash="3 3"),
            _text(frame.right, y - 4, level.name, "end", 11),
        ]
    for one in finite:
        parts += _draw(one, frame)
    return "".join([*parts, "</svg>"])


def _axes(frame: _Frame, x_label: str) -> list[str]:
    parts = []
    marks = ticks(*frame.y)
    for value, text in zip(marks, tick_texts(marks), strict=True):
        _, y = frame.at(frame.x[0], value)
        parts.append(_line((frame.left, y), (frame.right, y), "rule"))
        parts.append(_text(frame.left - 6, y + 4, text, "end", 11))
    marks = ticks(*frame.x)
    for value, text in zip(marks, tick_texts(marks), strict=True):
        x, _ = frame.at(value, frame.y[0])
        parts.append(_text(x, frame.bottom + 16, text, "middle", 11))
    parts.append(_text((frame.left + frame.right) / 2, frame.bottom + 34, x_label, "middle", 12))
    return parts


def _legend_rows(names: Sequence[str]) -> list[list[str]]:
    """Names in rows that fit the width, at about 6.8 units a letter."""
    rows: list[list[str]] = [[]]
    used = 0.0
    for name in names:
        wide = 38 + 6.8 * len(name)
        if rows[-1] and used + wide > WIDTH - 28:
            rows.append([])
            used = 0.0
        rows[-1].append(name)
        used += wide
    return rows


def _legend(rows: Sequence[Sequence[str]], series: Mapping[str, Series]) -> list[str]:
    parts = []
    for r, names in enumerate(rows):
        x, y = 14.0, 38 + 17 * r
        for name in names:
            one = series[name]
            if one.line:
                parts.append(_line((x, y - 4), (x + 20, y - 4), f"series-{one.colour}", 2.2, DASHES[one.colour]))
            if one.marks:
                parts.append(_mark(x + 10, y - 4, one))
            parts.append(_text(x + 25, y, name, size=12, fill="ink"))
            x += 38 + 6.8 * len(name)
    return parts


def _mark(x: Number, y: Number, one: Series, tip: str = "") -> str:
    """A dot on a line, a diamond where there is none."""
    colour, title = f"var(--series-{one.colour})", f"<title>{html.escape(tip)}</title>" if tip else ""
    if one.line:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">{title}</circle>'
    path = f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"
    return f'<path d="{path}" fill="var(--paper)" stroke="{colour}" stroke-width="1.8">{title}</path>'


def _draw(one: Series, frame: _Frame) -> list[str]:
    points = [frame.at(x, max(frame.y[0], min(y, frame.y[1]))) for x, y in zip(one.x, one.y, strict=True)]
    colour, parts = f"var(--series-{one.colour})", []
    if one.line and points:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = f' stroke-dasharray="{DASHES[one.colour]}"' if DASHES[one.colour] and not one.faint else ""
        look = 'stroke-width="1" opacity=".35"' if one.faint else f'stroke-width="2"{dash}'
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-linejoin="round" {look}/>')
    if one.marks:
        for i, (x, y) in enumerate(points):
            parts.append(_mark(x, y, one, f"{one.name}: {one.y[i]:.4g} at {one.x[i]:.4g}"))
            if i < len(one.labels):
                parts.append(_text(x, y - 9, one.labels[i], "middle", 10.5))
    return parts


def bars(title: str, groups: Mapping[str, Mapping[str, Number]], floor: Number = 0.0, percent: bool = True) -> str:
    """Grouped bars: `groups[group][name]`, values over the bars. They stand on `floor`; from a floor of 0, lower ones hang.

    Raises:
        ValueError: nothing to draw.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    if not names:
        raise ValueError(f"plot '{title}': no bar to draw")
    rows = _legend_rows(names)
    values = [value for group in groups.values() for value in group.values()]
    y_range = (min(floor, *values) if floor == 0 else floor, max(floor + 1e-9, *values))
    frame = _Frame(14, 50 + 17 * len(rows), WIDTH - 14, HEIGHT - 30, (0, len(groups)), y_range)
    _, ground = frame.at(0, floor)
    parts = [_open(WIDTH, HEIGHT, title), _text(14, 20, title, size=14, fill="ink", weight=600)]
    for i, name in enumerate(names):  # the legend's squares
        row = next(r for r, line in enumerate(rows) if name in line)
        x = 14 + sum(38 + 6.8 * len(other) for other in rows[row][: rows[row].index(name)])
        parts.append(_rect(x, 28 + 17 * row, 12, 12, f"series-{i % 4}", 'rx="2"/>'))
        parts.append(_text(x + 18, 38 + 17 * row, name, fill="ink"))
    slot = (frame.right - frame.left) / len(groups)
    wide = min(slot * 0.86 / len(names), 46)
    for g, (group, of) in enumerate(groups.items()):
        start = frame.left + slot * (g + 0.5) - wide * len(names) / 2
        for i, name in enumerate(names):
            if name not in of:
                continue
            x, (_, y) = start + i * wide, frame.at(0, max(of[name], y_range[0]))
            tip = f"<title>{html.escape(f'{group}, {name}: {of[name]:.4g}')}</title>"
            parts.append(_rect(x + 1.5, min(y, ground), wide - 3, abs(ground - y), f"series-{i % 4}", f'rx="2">{tip}</rect>'))
            label = f"{100 * of[name]:.1f}" if percent else f"{of[name]:.3f}".replace("-", "\u2212")
            parts.append(_text(x + wide / 2, min(y, ground) - 4, label, "middle", min(11, wide / 2.7), "ink"))
        parts.append(_text(frame.left + slot * (g + 0.5), frame.bottom + 18, group, "middle", 12, "ink"))
    parts.append(_line((frame.left, ground), (frame.right, ground), "soft"))
    return "".join([*parts, "</svg>"])


@dataclasses.dataclass(frozen=True)
class Box:
    """A stage in the picture of the loop: its place on the grid, its name and what is said below it."""

    column: Number
    row: Number
    title: str
    note: str
    inside: bool = True  # of the loop, not on the way to it


def flow(title: str, boxes: Mapping[str, Box], arrows: Sequence[tuple[str, str]], said: Sequence[str] = ()) -> str:
    """Boxes on a grid with straight arrows between neighbours; `said` is written right of the first box."""
    wide, tall, gap_x, gap_y, edge = 152, 54, 30, 30, 8
    columns, rows = (1 + max(getattr(box, axis) for box in boxes.values()) for axis in ("column", "row"))
    width, height = columns * (wide + gap_x) - gap_x + 2 * edge, rows * (tall + gap_y) - gap_y + 2 * edge
    corner = {name: (edge + box.column * (wide + gap_x), edge + box.row * (tall + gap_y)) for name, box in boxes.items()}
    parts = [
        _open(width, height, title),
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="var(--soft)"/></marker></defs>',
    ]
    for a, b in arrows:
        (x0, y0), (x1, y1) = corner[a], corner[b]
        if y0 == y1:
            right = x1 > x0
            start, end = (x0 + wide * right, y0 + tall / 2), (x1 + wide * (not right), y1 + tall / 2)
        else:
            down = y1 > y0
            start, end = (x0 + wide / 2, y0 + tall * down), (x1 + wide / 2, y1 + tall * (not down))
        parts.append(_line(start, end, "soft", 1.8).replace("/>", ' marker-end="url(#tip)"/>'))
    for name, box in boxes.items():
        x, y = corner[name]
        stroke = "series-0" if box.inside else "rule"
        parts.append(_rect(x, y, wide, tall, "card", f'rx="9" stroke="var(--{stroke})" stroke-width="1.5"/>'))
        parts.append(_text(x + wide / 2, y + 23, box.title, "middle", 14, "ink", 600))
        parts.append(_text(x + wide / 2, y + 41, box.note, "middle", 12))
    for i, line in enumerate(line for text in said for line in textwrap.wrap(text, 50)):
        parts.append(_text(edge + wide + gap_x, edge + 13 + 18 * i, line, size=12.5))
    return "".join([*parts, "</svg>"])
