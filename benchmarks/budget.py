"""Seconds for a whole run, so that what is left when they end is said and not cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

NO_TIME = {"skipped": "no time left (--seconds)"}
Item = TypeVar("Item")


class Budget:
    """What comes next is taken to need as long as the longest so far."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.end = clock, clock() + seconds
        self.longest = 0.0

    def spend(self, items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
        """(each of `items`, whether there is time for it)."""
        for item in items:
            start = self.clock()
            fits = start + self.longest < self.end
            yield item, fits
            if fits:
                self.longest = max(self.longest, self.clock() - start)
