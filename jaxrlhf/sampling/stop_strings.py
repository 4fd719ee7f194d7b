"""Strings that end a response, found token by token inside a program.

A string may begin and end in the middle of tokens, so an automaton reads the bytes of each: its state is the longest end of
the text so far that begins a stop string. One table, made once on the host, says which state each token leads to from each
state; a decode step looks up one number a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

START = 0


def table(strings: Sequence[str], pieces: Sequence[bytes], vocab_size: int) -> np.ndarray:
    """[M, V] int32: the state after each token, from each state. START is the state before a response; the last state, M - 1,
    is that of every text in which some stop string stands, and is never left.

    `pieces[v]` are the bytes that token v adds to the text, none for a special token (`Tokenizer.pieces`). An embedding may
    have more rows than the tokenizer ids, `vocab_size` in all: these add nothing.
    Source: Aho and Corasick 1975, "Efficient string matching: an aid to bibliographic search", algorithms 2 to 4.

    Raises:
        ValueError: there is no string, or one is empty.
    """
    if not strings or not all(strings):
        raise ValueError(f"stop strings {list(strings)!r}: give one or more, none of them empty")
    by_byte = _automaton([string.encode() for string in strings])
    end = len(by_byte) - 1
    pieces = [*pieces, *[b""] * (vocab_size - len(pieces))]
    lengths = np.array([len(piece) for piece in pieces])
    padded = np.zeros((len(pieces), max(lengths.max(initial=0), 1)), np.uint8)
    for token, piece in enumerate(pieces):
        padded[token, : len(piece)] = np.frombuffer(piece, np.uint8)
    found = np.repeat(np.arange(end + 1, dtype=np.int32)[:, None], len(pieces), axis=1)
    for place in range(padded.shape[1]):
        longer = np.flatnonzero(lengths > place)
        found[:, longer] = by_byte[found[:, longer], padded[longer, place]]
    return found


def _automaton(strings: list[bytes]) -> np.ndarray:
    """[M, 256] int32: the state after each byte, from each state; the last state is found and stays so."""
    nodes: list[dict[int, int]] = [{}]
    ends: set[int] = set()
    for string in strings:
        node = START
        for byte in string:
            if byte not in nodes[node]:
                nodes[node][byte] = len(nodes)
                nodes.append({})
            node = nodes[node][byte]
        ends.add(node)
    after = np.zeros((len(nodes), 256), np.int32)
    shorter = np.zeros(len(nodes), np.int32)  # the state of the longest proper end of a state's text
    waiting: deque[int] = deque([START])
    while waiting:
        node = waiting.popleft()
        if shorter[node] in ends:
            ends.add(node)
        after[node] = after[shorter[node]] if node else START
        for byte, child in nodes[node].items():
            shorter[child] = after[node, byte] if node else START
            after[node, byte] = child
            waiting.append(child)
    return _with_one_end(after, ends)


def _with_one_end(after: np.ndarray, ends: set[int]) -> np.ndarray:
    """The states in their order but for those at which a string ends, which become the last one."""
    going = [node for node in range(len(after)) if node not in ends]
    named = np.full(len(after), len(going), np.int32)
    named[going] = np.arange(len(going))
    return np.concatenate([named[after[going]], np.full((1, 256), len(going), np.int32)])
