"""What a compiled program moves: its collectives, and its copies of large arrays, read from the text of its HLO.

Counted as often as it runs: what stands in the body of a loop whose number of turns XLA knows counts that many times.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64}
BITS |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
MOVES = {"copy", "transpose", "copy-start"}  # nothing but these, and what is free, makes a fusion that only moves
FREE = {"parameter", "bitcast", "tuple", "get-tuple-element", "constant", "convert", "reshape"}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) ")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_OPERATION = re.compile(r"(?:^|[\s)}])([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))")
_TURNS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"\}')


class Instruction(NamedTuple):
    name: str
    operation: str
    bytes: int  # of the result; of one that starts something, of what will come out
    line: str


def read(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each computation, by name; the one that runs first is called `ENTRY`."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            if (match := _COMPUTATION.match(line)) is not None:
                current = found.setdefault("ENTRY" if line.startswith("ENTRY") else match[1], [])
        elif (match := _INSTRUCTION.match(line)) is not None:
            instruction = _instruction(match[1], match[2])
            if instruction is not None:
                current.append(instruction)
    return found


def _instruction(name: str, rest: str) -> Instruction | None:
    shape, body = _split_shape(rest)
    match = _OPERATION.search(" " + body)
    if match is None:
        return None
    operation = match[1]
    sizes = [_size(kind, dimensions) for kind, dimensions in _ARRAY.findall(shape) if kind in BITS]
    # (operand, result, ...) of what is started: the result is the second, of several operands the second half.
    if operation.endswith("-start") and shape.startswith("(") and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :] if shape.startswith("((") else sizes[1:2]
    return Instruction(name, operation, sum(sizes), rest)


def _split_shape(rest: str) -> tuple[str, str]:
    """The type of the result, which may be a tuple of types, and what follows it."""
    if not rest.startswith("("):
        shape, _, body = rest.partition(" ")
        return shape, body
    depth = 0
    for i, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[: i + 1], rest[i + 1 :]
    return rest, ""


def _size(kind: str, dimensions: str) -> int:
    count = 1
    for size in filter(None, dimensions.split(",")):
        count *= int(size)
    return count * BITS[kind] // 8


def runs(computations: dict[str, list[Instruction]]) -> dict[str, int]:
    """How often each computation runs in one run of the program. Of a loop whose turns are not known, once."""
    times = dict.fromkeys(computations, 0)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in computations[name]:
            turns = _TURNS.search(instruction.line) if instruction.operation == "while" else None
            for called in _called(instruction):
                if called in computations:
                    visit(called, count * (int(turns[1]) if turns else 1))

    visit("ENTRY", 1)
    return times


def _called(instruction: Instruction) -> Iterator[str]:
    for several, one in _CALLED.findall(instruction.line):
        yield from (name.strip().lstrip("%") for name in (several or one).split(","))


def collectives(text: str) -> dict[str, dict[str, int]]:
    """{kind: {"places": in the program's text, "runs": how often, "bytes": of results, all runs together}}."""
    computations = read(text)
    times = runs(computations)
    found: dict[str, dict[str, int]] = {}
    for name, instructions in computations.items():
        for instruction in instructions:
            kind = instruction.operation.removesuffix("-start")
            if kind in COLLECTIVES and times[name]:
                entry = found.setdefault(kind, {"places": 0, "runs": 0, "bytes": 0})
                entry["places"] += 1
                entry["runs"] += times[name]
                entry["bytes"] += times[name] * instruction.bytes
    return dict(sorted(found.items()))


def moved(text: str, least: int) -> list[tuple[str, int, int]]:
    """(what, bytes of each, how often) of copies and transpositions of at least `least` bytes that stand outside of fusions,
    or are fusions of nothing else, the largest first."""
    computations = read(text)
    times, found = runs(computations), []
    fused = {called for own in computations.values() for x in own if x.operation == "fusion" for called in _called(x)}
    for name, instructions in computations.items():
        if name in fused or not times[name]:
            continue
        for instruction in instructions:
            if instruction.bytes < least:
                continue
            within = [x.operation for called in _called(instruction) for x in computations.get(called, [])]
            only_moves = instruction.operation == "fusion" and set(within) & MOVES and set(within) <= MOVES | FREE
            if instruction.operation in MOVES or only_moves:
                what = "fusion of " + "+".join(sorted(set(within) & MOVES)) if only_moves else instruction.operation
                found.append((f"{what} {instruction.line.partition(' ')[0]}", instruction.bytes, times[name]))
    return sorted(found, key=lambda each: -each[1] * each[2])


def memory(compiled: Any) -> dict[str, int]:
    """Bytes of a device: arguments, results, of these what takes the place of arguments, temporaries; and the host's."""
    sizes: Any = compiled.memory_analysis() if hasattr(compiled, "memory_analysis") else compiled.get_compiled_memory_stats()
    return {
        "arguments": sizes.argument_size_in_bytes,
        "results": sizes.output_size_in_bytes,
        "aliased": sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "host_arguments": sizes.host_argument_size_in_bytes,
        "host_temporaries": sizes.host_temp_size_in_bytes,
    }
