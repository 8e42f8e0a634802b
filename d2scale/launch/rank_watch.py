"""Tell which rank keeps the others waiting, and end the run when it has for too long.

A rank that died is noticed by whoever started it. One that hangs is not: in a loop, on a disk that
does not answer, stopped by a signal. Collective calls say nothing for half an hour.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch.distributed as dist

from d2scale.errors import D2ScaleError
from d2scale.step.waiting import Wait, present_wait

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
# Loading and evaluating may keep ranks apart for a few seconds.
_TOLD_AFTER_SECONDS, _TOLD_AGAIN_AFTER_SECONDS = 10.0, 60.0


@dataclass(frozen=True)
class RankWatch:
    """A thread of one rank, which looks once a second for whom this rank waits."""

    store: dist.Store  # used by this thread alone: one that waits in it would block the other
    rank: int
    local_rank: int
    world_size: int
    timeout_seconds: float
    give_up: Callable[[D2ScaleError], None]  # ends this process

    def start(self) -> None:
        """Begin to watch, until this process ends."""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with suppress(RuntimeError):  # the store has ended with the run
            self._look_for_ever()

    def _look_for_ever(self) -> None:
        tell_after, told_in = _TOLD_AFTER_SECONDS, 0
        while True:
            time.sleep(_POLL_SECONDS)
            wait = present_wait()
            if wait is None or time.monotonic() - wait.since < _TOLD_AFTER_SECONDS / 2:
                continue
            if wait.number != told_in:
                tell_after, told_in = _TOLD_AFTER_SECONDS, wait.number
                self.store.set(f"waits{self.rank}", str(wait.number))
            waited = time.monotonic() - wait.since
            if waited > self.timeout_seconds:
                self.give_up(self._loss(wait))
            elif waited > tell_after:
                tell_after = waited + _TOLD_AGAIN_AFTER_SECONDS
                self._tell(wait, waited)

    def _missing(self, wait: Wait) -> list[int]:
        """Return the ranks that have not come to this exchange, or not waited for long in it."""
        others = (number for number in range(self.world_size) if number != self.rank)
        return [number for number in others if self._place_of(number) < wait.number]

    def _place_of(self, number: int) -> int:
        key = f"waits{number}"
        return int(self.store.get(key)) if self.store.check([key]) else 0

    def _names(self, missing: list[int]) -> str:
        some = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
        return f"rank {some} of {self.world_size}" if missing else "the other ranks"

    def _tell(self, wait: Wait, waited: float) -> None:
        missing = self._missing(wait)
        neighbours = range(self.rank - self.local_rank, self.rank)
        if not set(neighbours) <= set(missing):
            return  # the first rank here that waits tells of it
        text = f"waiting for {self._names(missing)} for {waited:.0f} s, "
        text += f"until {self.timeout_seconds:g} s (--rank-timeout)"
        logger.warning(text)
        if self.rank != 0:  # whose log lines go to a file of its own
            sys.stderr.write(f"d2scale: {text}\n")

    def _loss(self, wait: Wait) -> D2ScaleError:
        return D2ScaleError(
            f"{self._names(self._missing(wait))} kept rank {self.rank} waiting for "
            f"{self.timeout_seconds:g} s: look at what it does there, or wait longer with "
            "--rank-timeout; --resume goes on from the last checkpoint"
        )
