"""Whether the final losses of two trainings differ by more than noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Differences up to so many standard errors are noise: 19 in 20 of those without a cause.
NOISE_ERRORS = 2.0
# The window begins after the last learning-rate drop of the published schedule.
_WINDOW_BEGINS = 5 / 6
_FEWEST = 3


@dataclass(frozen=True)
class FinalLoss:
    """The mean loss over the last sixth of a training's iterations."""

    mean: float
    error: float  # standard error of the mean; nan for too few points
    points: int  # rows of metrics.json

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if math.isnan(self.error) else f" ± {self.error:.4f}")


def final_loss(iterations: Sequence[float], losses: Sequence[float]) -> FinalLoss | None:
    """Return the mean of the losses over the last sixth of the iterations, and its standard error.

    The rate is constant there, so the values scatter about one level: their standard deviation
    over the root of their number is the noise that the choice of images leaves in the mean. None
    without losses; ``iterations`` (by the gain rule the recipe's: its rate drops by those) is
    ascending, one for each of them.
    """
    if not losses:
        return None
    first = _WINDOW_BEGINS * iterations[-1]
    window = [loss for done, loss in zip(iterations, losses, strict=True) if done > first]
    enough = len(window) >= _FEWEST
    error = statistics.stdev(window) / math.sqrt(len(window)) if enough else math.nan
    return FinalLoss(statistics.fmean(window), error, len(window))


def compare(loss: FinalLoss, baseline: FinalLoss) -> str:
    """Return in words whether a loss agrees with the baseline's, within the noise of both."""
    difference = loss.mean - baseline.mean
    noise = math.hypot(loss.error, baseline.error)
    if math.isnan(noise):
        return f"{difference:+.4f}; the training is too short to know its noise"
    agrees = abs(difference) <= NOISE_ERRORS * noise
    errors = f", {abs(difference) / noise:.1f} standard errors" if noise else ""
    return f"{difference:+.4f}{errors}: {'within noise' if agrees else 'more than noise'}"
