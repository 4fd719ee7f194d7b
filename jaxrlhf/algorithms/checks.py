"""Settings that make no sense, refused with the limit that they break."""

from __future__ import annotations

from typing import Any


def at_least(config: Any, least: int | float, *names: str) -> None:
    """Each field is None or a number >= least.

    Raises:
        ValueError: one is smaller.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name}={value} must be >= {least:g}")


def above(config: Any, limit: int | float, *names: str) -> None:
    """Each field is None, which turns it off, or a number > limit.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > limit:
            raise ValueError(f"{name}={value} must be > {limit:g}; None turns it off where it may be None")


def within(config: Any, low: int | float, high: int | float, *names: str) -> None:
    """Each field is a number in [low, high].

    Raises:
        ValueError: one is not.
    """
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            raise ValueError(f"{name}={value} must be in [{low:g}, {high:g}]")


def given(holder: Any, who: str, *names: str) -> None:
    """Each field is there.

    Raises:
        ValueError: one is None.
    """
    for name in names:
        if getattr(holder, name) is None:
            kind = type(holder).__name__
            raise ValueError(f"{who} needs {kind}.{name}: ask for it where the {kind} is made")
