"""Asking a search for schedules before the outcomes of the last few are there."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from metalgen.tuning.search.search import FAILED, Search

Item = TypeVar("Item", bound=Hashable)


class Asks(Protocol[Item]):
    """What a session asks of a search, whether it is its own or shared with other workers."""

    @property
    def asked(self) -> Sequence[Item]:
        """Everything that was asked for, in order."""

    @property
    def pending(self) -> Sequence[Item]:
        """What this session asked for and has no outcome of, in order."""

    @property
    def times(self) -> Mapping[Item, float]:
        """The outcomes: seconds, infinity for what failed."""

    def ask(self) -> Item | None:
        """The next to try; None when all have been, or when outcomes must come first."""

    def tell(self, item: Item, seconds: float | None) -> None:
        """The outcome of the first that is pending: its time, or None where it has none."""


class Ahead(Generic[Item]):
    """The asks of a search whose outcomes come late, so that they can be compiled meanwhile.

    The n-th ask knows the first ``n - ahead + 1`` outcomes; those in between are taken to be
    median, so that it is not their neighbours that it asks for. Which outcomes an ask knows depends
    on its number alone, not on which have come by then. So a search that was interrupted goes on as
    an undisturbed one would.

    Args:
        make: a new search, which was told nothing.
        rows: what was tried before, in order, with the seconds (None: failed).
        ahead: asks that may be without an outcome at a time; with 1 every ask knows all.
    """

    def __init__(
        self,
        make: Callable[[], Search[Item]],
        rows: Iterable[tuple[Item, float | None]] = (),
        ahead: int = 1,
    ) -> None:
        self._make = make
        self._search = make()  # is told what the next ask knows
        self._known = 0
        self.ahead = ahead
        self.asked: list[Item] = []
        self.times: dict[Item, float] = {}
        for item, seconds in rows:
            if item not in self.times:
                self.asked.append(item)
                self.tell(item, seconds)

    @property
    def pending(self) -> list[Item]:
        """What was asked for and has no outcome, in order."""
        return self.asked[len(self.times) :]

    def tell(self, item: Item, seconds: float | None) -> None:
        """The outcome of the first that is pending: its time, or None where it has none."""
        assert item == self.asked[len(self.times)], "outcomes come in the order of the asks"
        self.times[item] = FAILED if seconds is None else seconds

    def ask(self) -> Item | None:
        """The next to try; None when all have been, or when outcomes must come first."""
        known = max(0, len(self.asked) - self.ahead + 1)
        if known > len(self.times):
            return None
        for item in self.asked[self._known : known]:
            self._tell(self._search, item, self.times[item])
        self._known = max(self._known, known)
        search = self._search
        if known < len(self.asked):
            search = self._make()
            for item in self.asked[:known]:
                self._tell(search, item, self.times[item])
            ran = [t for item in self.asked[:known] if (t := self.times[item]) < FAILED]
            middle = statistics.median(ran) if ran else FAILED
            for item in self.asked[known:]:
                self._tell(search, item, middle)
        found = search.ask()
        if found is not None:
            self.asked.append(found)
        return found

    @staticmethod
    def _tell(search: Search[Item], item: Item, seconds: float) -> None:
        search.tell(item, seconds if seconds < FAILED else None)
