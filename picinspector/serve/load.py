"""How much is under way, and how long one more would wait: who would wait in vain is told so at once."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from picinspector.serve.problems import busy

#: Photos whose time is remembered. The median of them: one that hangs in its decoder says nothing of the others.
_REMEMBERED = 32
#: What is thought of them before the first. Most take less: who comes with hundreds at once is let in a little later.
_FIRST_ROUND_S = 1.0
#: What one more may be expected to wait, of the time that a request has. Photos differ, and some are ten times as large
#: as those before.
_PATIENCE = 0.5


@dataclass(frozen=True)
class Capacity:
    """What the replicas take.

    Attributes:
        workers: photos that are worked on at the same moment.
        places: photos that may be under way, those that wait included.
    """

    workers: int
    places: int


class Load:
    """The photos under way."""

    def __init__(self, capacity: Capacity, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """None yet.

        Args:
            capacity: of the replicas.
            timeout_s: of a request.
            clock: in seconds.
        """
        self._capacity, self._patience_s, self._clock = capacity, _PATIENCE * timeout_s, clock
        self._under_way = 0
        self._round_s = deque([_FIRST_ROUND_S], maxlen=_REMEMBERED)

    @property
    def is_full(self) -> bool:
        """Whether one more photo would find no place, or wait too long at one."""
        if self._under_way < self._capacity.workers:  # it would not wait
            return False
        wait_s = self._rounds(self._under_way + 1) * self._a_round_s()
        return self._under_way >= self._capacity.places or wait_s > self._patience_s

    @contextlib.contextmanager
    def photo(self) -> Iterator[Place]:
        """A photo's place, for as long as it is under way.

        Raises:
            RequestError: it is full.
        """
        if self.is_full:
            raise busy("too many photos are waiting; come again")
        self._under_way += 1
        try:
            yield Place(self, self._clock(), self._rounds(self._under_way))
        finally:
            self._under_way -= 1

    def _rounds(self, photos: int) -> int:
        """In how many rounds so many are done, each worker with one a round."""
        return -(-photos // self._capacity.workers)

    def _a_round_s(self) -> float:
        return statistics.median(self._round_s)


@dataclass(frozen=True)
class Place:
    """Of one photo among those under way."""

    load: Load
    since_s: float
    rounds: int

    def passed(self) -> None:
        """Remember how long it took: till the answer, or till nobody waited for it any more."""
        self.load._round_s.append((self.load._clock() - self.since_s) / self.rounds)

    @property
    def had_to_wait(self) -> bool:
        """Whether the workers had enough with those that came before."""
        return self.rounds > 1
