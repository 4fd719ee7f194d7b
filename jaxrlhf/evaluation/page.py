"""A page as a list of blocks, written once and rendered twice: a self-contained HTML file, and Markdown with SVG files.

Text in blocks is plain but for `code` and **bold**. Everything that a model wrote is escaped.
"""

from __future__ import annotations

import dataclasses
import html
import re
import unicodedata
from collections.abc import Mapping, Sequence

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


@dataclasses.dataclass(frozen=True)
class Shares:
    """Parts of a whole, the largest first, each with its bar."""

    parts: Sequence[tuple[str, float, str]]  # (name, share in 0 .. 1, what is said of it)


@dataclasses.dataclass(frozen=True)
class Folded:
    """What is seen after a click: blocks, or text as it stands."""

    title: str
    inside: Sequence[Block] | str
    open: bool = False


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A response token by token, with `numbers[name]`: one for each token, None where there is none."""

    prompt: str
    tokens: Sequence[str]
    numbers: Mapping[str, Sequence[float | None]]
    said: str
    finished: bool = True


@dataclasses.dataclass(frozen=True)
class HeatMaps:
    """Rollouts under their headings, coloured by one of the numbers, which the reader chooses; one a page. `scale`: at which
    size each number has its full colour."""

    rollouts: Mapping[str, Sequence[Rollout]]
    scale: Mapping[str, float]


Block = Heading | Paragraph | Tiles | Table | Figures | Samples | Shares | Folded | HeatMaps
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
.share { display: grid; grid-template-columns: 7em 1fr 11em; gap: 10px; align-items: center; font-size: .9rem; margin: 5px 0;
  font-variant-numeric: tabular-nums }
.share div { height: 14px; background: var(--card); border-radius: 7px; overflow: hidden }
.share div span { display: block; height: 100%; background: var(--series-0); border-radius: 7px }
.share small { color: var(--soft); text-align: right }
details { margin: 8px 0; border: 1px solid var(--rule); border-radius: 10px; padding: 0 14px }
details[open] { padding-bottom: 12px }
summary { cursor: pointer; padding: 8px 0; font-weight: 600 }
pre { font: .84rem/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
.heat > input { position: absolute; opacity: 0 }
.heat > label { display: inline-block; padding: 3px 13px; margin: 0 4px 6px 0; border: 1px solid var(--rule);
  border-radius: 99px; cursor: pointer; font-size: .9rem }
.heat > input:checked + label { background: var(--ink); color: var(--paper); border-color: var(--ink) }
.heat > input:focus-visible + label { outline: 2px solid var(--series-0); outline-offset: 2px }
.scale { display: none; color: var(--soft); font-size: .85rem; margin: 2px 0 8px }
.rollout { background: var(--card); border-radius: 10px; padding: 9px 14px; margin: 10px 0 }
.rollout p { margin: 2px 0; max-width: none; overflow-wrap: anywhere }
.rollout .said { color: var(--soft); font-size: .82rem }
.rollout .prompt { white-space: pre-wrap; max-height: 9em; overflow-y: auto; font-weight: 600 }
.tokens { line-height: 1.9; white-space: pre-wrap }
.tokens i { font-style: normal; padding: 2px 0; margin-right: 1px; border-radius: 3px; unicode-bidi: isolate;
  outline: none;
  background: color-mix(in srgb, var(--series-1) calc(max(0, var(--c)) * 60%),
    color-mix(in srgb, var(--series-0) calc(max(0, -1 * var(--c)) * 60%), transparent)) }
.tokens i:hover, .tokens i:focus { box-shadow: 0 0 0 2px var(--ink) }
.tokens i:hover::after, .tokens i:focus::after { content: attr(data-t); position: fixed; left: 0; right: 0; bottom: 0;
  z-index: 9; background: var(--ink); color: var(--paper); padding: 9px 18px; font-size: .9rem; line-height: 1.4;
  font-variant-numeric: tabular-nums }
.tokens .end { color: var(--soft) }
@media (max-width: 560px) { .share { grid-template-columns: 5.5em 1fr 8.5em; gap: 7px; font-size: .82rem } }
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
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
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
        case Shares(parts):
            return "\n".join(
                f"<div class=share><span>{inline(name)}</span><div><span style='width:{100 * min(max(share, 0), 1):.2f}%'>"
                f"</span></div><small>{inline(said)}</small></div>"
                for name, share, said in parts
            )
        case Folded(title, inside, opened):
            body = f"<pre>{html.escape(inside)}</pre>" if isinstance(inside, str) else "\n".join(map(_html, inside))
            return f"<details{' open' * opened}><summary>{inline(title)}</summary>{body}</details>"
        case HeatMaps(rollouts, scale):
            return _heat_maps(rollouts, scale)


def _heat_maps(rollouts: Mapping[str, Sequence[Rollout]], scale: Mapping[str, float]) -> str:
    """Without a script: a radio button a number, and the colour of a token is a variable that the checked one names."""
    buttons, scales, rules = [], [], []
    for i, (name, full) in enumerate(scale.items()):
        buttons.append(
            f"<input type=radio name=heat id=heat{i}{' checked' * (i == 0)}><label for=heat{i}>{inline(name)}</label>"
        )
        both = f"orange above 0, blue below, full colour at {full:.3g}" if full else "0 at every token"
        scales.append(f"<p class=scale id=scale{i}>{both}; touch a token for its numbers</p>")
        rules.append(f"#heat{i}:checked~details i{{--c:var(--h{i},0)}}#heat{i}:checked~#scale{i}{{display:block}}")
    groups = (
        f"<details{' open' * (i == 0)}><summary>{inline(title)}</summary>"
        f"{''.join(_rollout(row, scale) for row in rows)}</details>"
        for i, (title, rows) in enumerate(rollouts.items())
    )
    return f"<style>{''.join(rules)}</style><div class=heat>{''.join(buttons)}{''.join(scales)}{''.join(groups)}</div>"


def _rollout(row: Rollout, scale: Mapping[str, float]) -> str:
    cells = []
    for t, token in enumerate(row.tokens):
        found = {name: row.numbers[name][t] for name in row.numbers}
        told = " \u00b7 ".join(f"{name} {'not finite' if x is None else f'{x:.4g}'}" for name, x in found.items())
        colours = ";".join(
            f"--h{i}:{max(-1.0, min(1.0, x / full)):.3f}"
            for i, (name, full) in enumerate(scale.items())
            if full and (x := found.get(name)) is not None
        )
        last = not token and row.finished and t == len(row.tokens) - 1
        shown = "<span class=end>\u25a0</span>" if last else html.escape(visible(token) or "\u00b7")
        told = html.escape(f"{visible(token)!r}: {told}" if token else told)
        cells.append(f'<i tabindex=-1 style="{colours}" data-t="{told}">{shown}</i>')
    prompt = f"<p class=prompt>{html.escape(visible(row.prompt, breaks=True))}</p>"
    return f"<div class=rollout>{prompt}<p class=tokens>{''.join(cells)}</p><p class=said>{inline(row.said)}</p></div>"


def visible(text: str, breaks: bool = False) -> str:
    """Text in which nothing hides: signs for control characters and for those that turn the direction of writing. Line breaks
    stay where `breaks`."""

    def sign(letter: str) -> str:
        code = ord(letter)
        if letter == "\n":
            return "\n" if breaks else "\u21b5\n"
        if code < 0x20 or code == 0x7F:
            return {9: "\u21e5"}.get(code, chr(0x2400 + code if code < 0x20 else 0x2421))
        hides = unicodedata.category(letter) in ("Cf", "Cs", "Co", "Cn") or 0x80 <= code < 0xA0
        return f"\u27e8U+{code:04X}\u27e9" if hides and letter != "\u200d" else letter

    return "".join(map(sign, text))


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
        case Shares(parts):
            return "\n".join(f"- {name}: {100 * share:.1f} % ({said})" for name, share, said in parts)
        case Folded(title, inside):
            if isinstance(inside, str):
                text = "\n".join(f"    {line}" for line in inside.split("\n"))
            else:
                text = "\n\n".join(_markdown(each, folder) for each in inside)
            return f"### {title}\n\n{text}"
        case HeatMaps(rollouts):
            return "\n".join(
                f"- *{_literal(title)}*: **{_literal(row.prompt)}** {_literal(''.join(row.tokens))} ({row.said})"
                for title, rows in rollouts.items()
                for row in rows
            )


def figures(blocks: Sequence[Block]) -> list[Figure]:
    """All pictures of a page."""
    found = []
    for block in blocks:
        found += block.figures if isinstance(block, Figures) else []
        found += figures(block.inside) if isinstance(block, Folded) and not isinstance(block.inside, str) else []
    return found
