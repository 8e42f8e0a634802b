"""Parts of a step that every rank completes, or none: no rank waits for one that failed.

A rank that fails between two collective calls would leave the others in the second one for ever.
So each part of a step that can fail runs here, and the ranks exchange one flag each before any of
them goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from d2scale.step import ranks
from d2scale.step.out_of_memory import is_out_of_memory

T = TypeVar("T")

# How a part of a step ended on a rank.
_DONE, _OUT_OF_MEMORY, _FAILED = 0, 1, 2
# For the rank that failed to end first, on a busy machine too; a launcher then ends the others.
_ECHO_SECONDS = 30.0


class AnotherRankFailedError(RuntimeError):
    """Another rank failed for another reason than memory; raised on the ranks that did not."""


class AgreedOutOfMemoryError(Exception):
    """Some rank ran out of memory; raised on every rank."""

    def __init__(self, part: str, ranks: Sequence[int], reason: str) -> None:
        super().__init__(f"{part}: out of memory on rank {', '.join(map(str, ranks))}")
        self.part = part  # what the ranks were doing
        self.ranks = tuple(ranks)  # those that failed
        self.reason = reason  # the first line of this rank's error; empty if it did not fail


def run_together(part: str, work: Callable[[], T], counts: Tensor | None = None) -> T:
    """Run ``work`` on every rank and return its result, if it succeeded on all of them.

    ``work`` makes no collective calls that a failing rank would miss. ``counts``, int64 on the CPU,
    are read after it and summed over the ranks in place, in the same exchange.

    Raises:
        AgreedOutOfMemoryError: on every rank, if any of them ran out of memory.
        AnotherRankFailedError: if ``work`` failed on another rank for another reason; there its
            own error passes unchanged.
    """
    results: list[T] = []
    reason = ""
    failure: Exception | None = None
    try:
        results.append(work())
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if not is_out_of_memory(error):
            failure = error
    # Outside of the handler: an out-of-memory error is gone, and the activations that its frames
    # held.
    outcome = _FAILED if failure else _DONE if results else _OUT_OF_MEMORY
    outcomes = _exchange(outcome, counts)
    if _FAILED in outcomes:
        results.clear()
        if failure is not None:
            raise failure
        # Launchers report the error of the rank that ends first.
        time.sleep(_ECHO_SECONDS)
        number = outcomes.index(_FAILED)
        raise AnotherRankFailedError(f"{part}: rank {number} failed; its own error says why")
    if _OUT_OF_MEMORY in outcomes:
        results.clear()
        failed = [number for number, outcome in enumerate(outcomes) if outcome == _OUT_OF_MEMORY]
        raise AgreedOutOfMemoryError(part, failed, reason)
    return results[0]


def run_alone(part: str, work: Callable[[], T], counts: Tensor | None = None) -> T:
    """Run ``work`` and sum ``counts`` as :func:`run_together` does; errors pass unchanged."""
    result = work()
    if counts is not None:
        ranks.sum_on_host(counts)
    return result


def _exchange(outcome: int, counts: Tensor | None) -> list[int]:
    """Return the outcomes of all ranks, and sum ``counts`` over them."""
    world_size = ranks.world_size()
    if world_size == 1:
        return [outcome]
    outcomes = torch.zeros(world_size, dtype=torch.int64)
    outcomes[ranks.rank()] = outcome
    if counts is None:
        return ranks.sum_on_host(outcomes).tolist()
    message = ranks.sum_on_host(torch.cat([outcomes, counts]))
    counts.copy_(message[world_size:])
    return message[:world_size].tolist()
