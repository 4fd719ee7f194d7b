"""Plots as SVG text, drawn by matplotlib: line charts, grouped bars and the picture of the loop.

Colours become CSS variables, so that a picture follows the page's light or dark scheme.
"""

from __future__ import annotations

import dataclasses
import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

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
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))
WIDTH, HEIGHT = 420, 285
LOOK: Any = {  # matplotlib's settings
    "svg.fonttype": "none",  # letters, not outlines
    "svg.hashsalt": "jaxrlhf",  # the same picture is the same text
    "font.size": 11,
    "text.color": LIGHT["ink"],
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": LIGHT["soft"],
    "axes.labelsize": 12,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.edgecolor": LIGHT["rule"],
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "figure.constrained_layout.w_pad": 0.12,  # inches
    "figure.constrained_layout.h_pad": 0.1,
    "grid.color": LIGHT["rule"],
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 12,
}


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
    reach = [min(half, i, n - 1 - i) for i in range(n)]
    return [float(np.mean(values[i - r : i + r + 1])) for i, r in enumerate(reach)]


def lines(
    title: str,
    series: Sequence[Series],
    x_label: str,
    levels: Sequence[Level] = (),
    zero: bool = False,
    clip: Number = 0.0,
    marks: Sequence[Number] = (),
) -> str:
    """A line chart. Values that are not finite are left out; `clip` cuts that share of the highest values off the scale; at
    `marks` stand vertical lines.

    Raises:
        ValueError: nothing finite to draw.
    """
    finite = []
    for one in series:
        points = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
        finite.append(dataclasses.replace(one, x=[x for x, _ in points], y=[y for _, y in points]))
    ys = [y for one in finite for y in one.y]
    if not ys:
        raise ValueError(f"plot '{title}': no finite value to draw")

    def draw(axes: Any) -> None:
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.grid(axis="y")
        axes.margins(0.04, 0.1)
        for one in finite:
            _line(axes, one)
        for level in levels:
            axes.axhline(level.y, color=LIGHT["soft"], linewidth=1, linestyle=DASHES[1])
            ends = axes.get_yaxis_transform(), "offset points"
            axes.annotate(level.name, (1, level.y), (0, 3), *ends, ha="right", color=LIGHT["soft"])
        for mark in marks:
            axes.axvline(mark, color=LIGHT["bad"], linewidth=1, alpha=0.6)
        if clip:
            top = float(np.quantile(ys, 1 - clip, method="higher"))
            axes.set_ylim(top=top + 0.05 * (top - min(ys)) or None)
        if zero:
            axes.set_ylim(min(0.0, axes.get_ylim()[0]) if min(ys) < 0 else 0.0, max(0.0, axes.get_ylim()[1]))
        if sum(not one.faint for one in finite) > 1:
            _legend(axes)

    return _svg(title, draw)


def _line(axes: Any, one: Series) -> None:
    colour = LIGHT[f"series-{one.colour}"]
    look: dict[str, Any] = {"color": colour, "label": None if one.faint else one.name, "linewidth": 2, "markersize": 5}
    if one.faint:
        look |= {"linewidth": 1, "alpha": 0.35}
    else:
        look["linestyle"] = DASHES[one.colour] if one.line else "none"
    if one.marks:
        look |= {"marker": "o"} if one.line else {"marker": "D", "markerfacecolor": LIGHT["paper"], "markeredgewidth": 1.8}
    axes.plot(one.x, one.y, **look)
    for x, y, label in zip(one.x, one.y, one.labels, strict=False):
        axes.annotate(label, (x, y), (0, 6), textcoords="offset points", ha="center", color=LIGHT["soft"])


def _legend(axes: Any) -> None:
    names = axes.get_legend_handles_labels()[1]
    letters, row = [len(name) + 5 for name in names], 58
    fit = len(names) if sum(letters) <= row else max(1, row // max(letters))
    axes.figure.legend(loc="outside lower left", ncols=fit, handlelength=1.8, columnspacing=1.2)


def bars(title: str, groups: Mapping[str, Mapping[str, Number]], floor: Number = 0.0, percent: bool = True) -> str:
    """Grouped bars: `groups[group][name]`, values over the bars. They stand on `floor`; from a floor of 0, lower ones hang.

    Raises:
        ValueError: nothing to draw.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    if not names:
        raise ValueError(f"plot '{title}': no bar to draw")

    def said(value: Number) -> str:
        return f"{100 * value:.1f}" if percent else f"{value:.3f}".replace("-", "\u2212")

    def draw(axes: Any) -> None:
        axes.set_title(title)
        wide = 0.86 / len(names)
        for i, name in enumerate(names):
            places = [g for g, group in enumerate(groups.values()) if name in group]
            values = [group[name] for group in groups.values() if name in group]
            x = [g + (i - (len(names) - 1) / 2) * wide for g in places]
            # A bar below the floor is drawn as none, not downwards through the names, unless bars may hang.
            tall = [value - floor if floor == 0 else max(value - floor, 0.0) for value in values]
            drawn = axes.bar(x, tall, wide * 0.92, bottom=floor, color=LIGHT[f"series-{i % 4}"], label=name)
            size = min(11.0, 0.37 * wide * WIDTH / len(groups))
            axes.bar_label(drawn, [said(value) for value in values], padding=1, fontsize=size)
        axes.set_xticks(range(len(groups)), list(groups), color=LIGHT["ink"], fontsize=12)
        axes.yaxis.set_visible(False)
        axes.axhline(floor, color=LIGHT["soft"], linewidth=1)
        axes.spines.bottom.set_visible(False)
        axes.margins(y=0.12)
        _legend(axes)

    return _svg(title, draw)


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
    wide, tall, gap = 152, 54, 30
    columns, rows = (1 + max(getattr(box, axis) for box in boxes.values()) for axis in ("column", "row"))
    size = columns * (wide + gap) - gap + 16, rows * (tall + gap) - gap + 16
    centre = {
        name: (8 + wide / 2 + box.column * (wide + gap), 8 + tall / 2 + box.row * (tall + gap)) for name, box in boxes.items()
    }

    def draw(axes: Any) -> None:
        from matplotlib.patches import FancyBboxPatch

        axes.set(xlim=(0, size[0]), ylim=(size[1], 0), position=(0, 0, 1, 1))
        axes.set_axis_off()
        for a, b in arrows:
            between = [(centre[b][i] > centre[a][i]) - (centre[b][i] < centre[a][i]) for i in (0, 1)]  # -1, 0 or 1
            reach = [between[0] * wide / 2, between[1] * tall / 2]
            start, end = ([centre[name][i] + sign * reach[i] for i in (0, 1)] for name, sign in ((a, 1), (b, -1)))
            arrow = {"arrowstyle": "-|>", "color": LIGHT["soft"], "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", end, start, arrowprops=arrow)
        for name, box in boxes.items():
            x, y = centre[name]
            edge = LIGHT["series-0" if box.inside else "rule"]
            shape = FancyBboxPatch(
                (x - wide / 2, y - tall / 2), wide, tall, "round,pad=0,rounding_size=9", fc=LIGHT["card"], ec=edge, lw=1.5
            )
            axes.add_patch(shape)
            axes.text(x, y - 4, box.title, ha="center", size=14, weight="bold")
            axes.text(x, y + 14, box.note, ha="center", size=12, color=LIGHT["soft"])
        for i, text in enumerate(line for one in said for line in textwrap.wrap(one, 50)):
            axes.text(8 + wide + gap, 21 + 18 * i, text, size=12.5, color=LIGHT["soft"])

    return _svg(title, draw, size)


def _svg(title: str, draw: Callable[[Any], None], size: tuple[Number, Number] = (WIDTH, HEIGHT)) -> str:
    """The picture as text to stand inside a page: no declaration, no style of its own, colours as variables."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need the package matplotlib: pip install 'jaxrlhf[loop]'") from error
    text = io.StringIO()
    with matplotlib.rc_context(LOOK):
        figure = Figure((size[0] / 72, size[1] / 72), layout="constrained")  # 72 dots an inch: one unit is one pixel
        draw(figure.subplots())
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index(">") + 1 :], flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", body)
    for name, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{name})")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]:g} {size[1]:g}" role="img"'
    return f'{head} aria-label="{html.escape(title)}">{re.sub(chr(10) + " *", chr(10), body).strip()}'
