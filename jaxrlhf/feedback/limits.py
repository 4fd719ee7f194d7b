"""What a stranger, or a program gone wrong, may cost the labelling server."""

from __future__ import annotations

import dataclasses
import time


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes in bytes, rates a second, times in seconds."""

    body: int = 65_536  # of one request
    rate: int | float = 10.0  # requests of one person, on average
    burst: int = 30  # requests of one person at once
    wrong_tokens: int = 10  # of one address in a minute
    at_once: int = 200  # requests being answered
    waiting: int = 256  # requests that wait for the disk
    read_seconds: int | float = 10.0  # until a request's body must be here

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise ValueError(f"limits.{name}={value} must be > 0: nothing would be let through")


class Bucket:
    """How often each key may: `rate` a second on average, `burst` at once."""

    def __init__(self, rate: int | float, burst: int, clock=time.monotonic):
        self._rate, self._burst, self._clock = rate, burst, clock
        self._levels: dict[str, tuple[float, float]] = {}  # key: (how full, when)

    def wait(self, key: str, take: bool = True) -> float:
        """0 where the key may now (and, with `take`, does), else the seconds until it may."""
        moment = self._clock()
        level, before = self._levels.get(key, (0.0, moment))
        level = max(0.0, level - (moment - before) * self._rate)
        if level + 1 > self._burst:
            return (level + 1 - self._burst) / self._rate
        if take:
            if len(self._levels) > 10_000:  # only keys that are not yet empty again are remembered
                self._levels = {k: v for k, v in self._levels.items() if v[0] - (moment - v[1]) * self._rate > 0}
            self._levels[key] = (level + 1, moment)
        return 0.0
