"""A page as a list of blocks, written once and rendered twice: a self-contained HTML file, and Markdown with SVG files.

Text in blocks is plain but for `code` and **bold**. Everything that a model wrote is escaped.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Sequence

from jaxrlhf.evaluation import plots


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str


@dataclasses.dataclass(frozen=True)
class Paragraph:
    text: str


@dataclasses.dataclass(frozen=True)
class Tile:
    """A figure to be seen first: its value, what it is, and its bounds or bar."""

    value: str
    name: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Tiles:
    tiles: Sequence[Tile]


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells are text; the first column is at the left, the others at the right. `MET` and `MISSED` are coloured."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture with its file name in the Markdown version; `wide` ones take the page's width."""

    name: str
    svg: str
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Figures:
    figures: Sequence[Figure]
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and what each of several policies made of it."""

    prompt: str
    answers: Sequence[tuple[str, str]]  # (policy, response)


@dataclasses.dataclass(frozen=True)
class Samples:
    samples: Sequence[Sample]


Block = Heading | Paragraph | Tiles | Table | Figures | Samples
MET, MISSED = "\u2713 met", "\u2717 missed"

CSS = """
* { box-sizing: border-box }
html { background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
body { margin: 0 auto; padding: 28px 18px 64px; max-width: 960px }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 12px }
h2 { font-size: 1.25rem; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid var(--rule) }
p { margin: 10px 0; max-width: 52em }
code { font: .88em ui-monospace, Menlo, Consolas, monospace; background: var(--card); padding: 1px 5px; border-radius: 4px;
  overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(138px, 1fr)); gap: 12px; margin: 22px 0 }
.tile { background: var(--card); border-radius: 10px; padding: 12px 14px }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25 }
.tile span { display: block; font-size: .9rem; line-height: 1.35 }
.tile small { display: block; color: var(--soft); font-size: .8rem }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 14px;
  margin: 16px 0 4px }
.figure { border: 1px solid var(--rule); border-radius: 10px; padding: 6px; min-width: 0 }
.figure svg { display: block; width: 100%; height: auto }
.wide { grid-column: 1 / -1 }
.wide svg { max-width: 640px; margin: 0 auto }
.caption { color: var(--soft); font-size: .9rem }
.scroll { overflow-x: auto; margin: 14px 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 60% }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }
th { color: var(--soft); font-weight: 600 }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9em; padding-left: 0 }
.met { color: var(--good) }
.missed { color: var(--bad); font-weight: 600 }
.samples { display: grid; gap: 10px; margin: 14px 0 }
.sample { background: var(--card); border-radius: 10px; padding: 10px 14px }
.sample p { margin: 3px 0; max-width: none; overflow-wrap: anywhere }
.sample .soft { color: var(--soft) }
.who { display: inline-block; min-width: 10.5em; color: var(--soft); font-size: .82rem }
@media (max-width: 560px) { .who { display: block; min-width: 0 } h1 { font-size: 1.45rem } }
"""


def inline(text: str) -> str:
    """HTML of a text with `code` and **bold**."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The whole page: no script, and nothing fetched from anywhere."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{plots.style()}{CSS}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{inline(text)}</h2>"
        case Paragraph(text):
            return f"<p>{inline(text)}</p>"
        case Tiles(tiles):
            cells = (
                f"<div class=tile><b>{inline(t.value)}</b><span>{inline(t.name)}</span><small>{inline(t.note)}</small></div>"
                for t in tiles
            )
            return f"<div class=tiles>{''.join(cells)}</div>"
        case Table(header, rows):
            head = "".join(f"<th>{inline(cell)}</th>" for cell in header)
            body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
            return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        case Figures(figures, caption):
            cells = "".join(f'<div class="figure{" wide" * figure.wide}">{figure.svg}</div>' for figure in figures)
            return f"<div class=figures>{cells}</div>" + (f"<p class=caption>{inline(caption)}</p>" if caption else "")
        case Samples(samples):
            return f"<div class=samples>{''.join(_sample(sample) for sample in samples)}</div>"


def _cell(text: str) -> str:
    kind = {MET: " class=met", MISSED: " class=missed"}.get(text, "")
    return f"<td{kind}>{inline(text)}</td>"


def _sample(sample: Sample) -> str:
    answers = "".join(
        f"<p><span class=who>{html.escape(name)}</span> <span class=soft>\u2026</span>{html.escape(text)}</p>"
        for name, text in sample.answers
    )
    return f"<div class=sample><p><b>{html.escape(sample.prompt)}</b> <span class=soft>\u2026</span></p>{answers}</div>"


def to_markdown(title: str, blocks: Sequence[Block], folder: str) -> str:
    """The page as Markdown; its pictures are files `folder`/NAME.svg."""
    return "\n\n".join([f"# {_literal(title)}", *(_markdown(block, folder) for block in blocks)]) + "\n"


def _literal(text: str) -> str:
    """Text that Markdown shows as it stands, on one line."""
    return re.sub(r"([\\`*_\[\]<>#|~])", r"\\\1", " ".join(text.split()))


def _markdown(block: Block, folder: str) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Paragraph(text):
            return text
        case Tiles(tiles):
            return "\n".join(f"- **{tile.value}** {tile.name}" + (f" ({tile.note})" if tile.note else "") for tile in tiles)
        case Table(header, rows):
            lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        case Figures(figures, caption):
            return "\n".join(
                [*(f"![{figure.name}]({folder}/{figure.name}.svg)" for figure in figures), *([caption] if caption else [])]
            )
        case Samples(samples):
            return "\n".join(
                f"- **{_literal(sample.prompt)}** \u2026\n"
                + "\n".join(f"  - *{name}*: \u2026{_literal(text)}" for name, text in sample.answers)
                for sample in samples
            )


def figures(blocks: Sequence[Block]) -> list[Figure]:
    """All pictures of a page."""
    return [figure for block in blocks if isinstance(block, Figures) for figure in block.figures]
