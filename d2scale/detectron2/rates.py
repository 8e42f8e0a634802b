"""The gain rule under detectron2's loop, which goes over the iterations of the recipe's schedule.

The plan leaves the schedule as the recipe has it, so an iteration is one of the recipe's steps,
and whatever counts iterations counts those: scheduler, checkpoints, evaluation, QAT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def rates_kept(optimizer: torch.optim.Optimizer) -> Iterator[list[float]]:
    """Yield the learning rates of the groups, and set them again at the end.

    Each attempt at a step, each step of an iteration and the scheduler itself, which may multiply
    what it finds, begin with the rates that the scheduler has set.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        yield rates
    finally:
        set_rates(optimizer, rates)


def set_rates(
    optimizer: torch.optim.Optimizer, rates: list[float], gain: float | None = None
) -> None:
    """Set the learning rate of each group to ``gain`` times that in ``rates``."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate if gain is None else gain * rate
