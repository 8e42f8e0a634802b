"""Micro-batches of an optimizer step: what a model offers to be split, and what a step returns.

A detection loss is a sum over locations or boxes, divided by a count that is known only for the
whole batch (the positives, say). Averaging the losses of micro-batches therefore trains another
objective. A model that can compute its counts from the ground truth alone makes the split exact:
the counts are summed over all micro-batches and ranks before the first forward, and every forward
divides by the same totals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from d2scale.planning.rules import split_evenly
from d2scale.step.noise import GradientNoise
from d2scale.step.norms import plain_norms, trained_norms

Sample = Mapping[str, Any]
MicroBatch = Sequence[Sample]
PhaseMarker = Callable[[str], AbstractContextManager[None]]


@runtime_checkable
class ExactModel(Protocol):
    """What a model offers so that its step can be split without changing it."""

    def __call__(self, samples: MicroBatch, normalizers: Mapping[str, Tensor]) -> Any:
        """Return the losses of ``samples`` by name, divided by the step's divisors."""

    def loss_normalizers(self, samples: MicroBatch) -> dict[str, Tensor]:
        """Return float64 scalars, sums over ``samples``, from their ground truth only."""

    def finish_normalizers(self, totals: dict[str, Tensor], world_size: int) -> dict[str, Tensor]:
        """Turn the totals of a step into the divisors of one rank's losses."""


@dataclass(frozen=True)
class StepLosses:
    """The losses of one optimizer step, as one batch would report them, the same on every rank."""

    names: tuple[str, ...]
    values: Tensor  # shape (names,), float64, on the model's device
    images: int  # of the step, over all ranks and micro-batches
    # What GradientNoise.of_parts takes: two sums of squares and the parts, float64, on the device;
    # None if the step did not measure.
    squares: Tensor | None = None

    @cached_property
    def losses(self) -> dict[str, float]:
        """Value by name. The first use waits for the device."""
        return dict(zip(self.names, self.values.tolist(), strict=True))

    @cached_property
    def noise(self) -> GradientNoise | None:
        """What the step has measured, None if that is nothing. The first use waits."""
        if self.squares is None:
            return None
        weighted, total, parts = self.squares.tolist()
        return GradientNoise.of_parts(weighted, total, parts=round(parts), images=self.images)

    @property
    def total(self) -> float:
        """Sum of the losses."""
        return sum(self.losses.values())


def cut(rank_batch: MicroBatch, ims_per_gpu: int) -> list[MicroBatch]:
    """Cut a rank's images of a step into as few and as even micro-batches as possible."""
    count = -(-len(rank_batch) // ims_per_gpu)
    samples = iter(rank_batch)
    return [list(islice(samples, size)) for size in split_evenly(len(rank_batch), count)]


def inexact_reasons(
    model: nn.Module, exact: ExactModel | None, *, one_forward: bool = False
) -> tuple[str, ...]:
    """Return why a split step of ``model`` is not exactly the step of one batch; empty: it is.

    ``exact`` is what tells the model's loss normalizers, None if nothing does. With ``one_forward``
    a rank takes its images of a step at once: synchronised batch norm then sees all of the step.
    """
    reasons = []
    if exact is None:
        reasons.append(
            f"{type(model).__name__} does not tell its loss normalizers, so the losses of a "
            "micro-batch count by its images: of losses that are divided by boxes the step may be "
            "far from the whole one's, while boxes sampled at random and padding to the images of "
            "a micro-batch change about one per cent each"
        )
    if trained := plain_norms(model) if one_forward else trained_norms(model):
        reasons.append(
            f"{len(trained)} batch norm layers (the first is {trained[0]}) take their statistics "
            "from one micro-batch"
        )
    return tuple(reasons)
