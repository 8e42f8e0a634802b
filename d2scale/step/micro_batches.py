"""Forward and backward of one optimizer step in micro-batches, with the gradient of one batch.

A detection loss is a sum over locations or boxes, divided by a count that is known only for the
whole batch (the positives, say). Averaging the losses of micro-batches therefore trains another
objective. A model that can compute its counts from the ground truth alone makes the split exact:
the counts are summed over all micro-batches and ranks before the first forward, and every forward
divides by the same totals.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from d2scale.planning.rules import split_evenly
from d2scale.step import ranks
from d2scale.step.agreement import run_alone, run_together
from d2scale.step.averaging import GradientAverager
from d2scale.step.noise import GradientNoise, SquaredNorms
from d2scale.step.norms import trained_norms

logger = logging.getLogger(__name__)

Sample = Mapping[str, Any]
MicroBatch = Sequence[Sample]
PhaseMarker = Callable[[str], AbstractContextManager[None]]


@runtime_checkable
class ExactModel(Protocol):
    """What a model offers so that its step can be split without changing it."""

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


class ForwardBackward:
    """Adds the gradients of one optimizer step to ``.grad``, as means over the ranks.

    The ranks may have different numbers of micro-batches and of images, but every rank makes the
    same collective calls. The model is bare, in training mode; called with a micro-batch (and
    ``normalizers``, if it is an :class:`ExactModel`), it returns its losses by name.
    """

    def __init__(
        self,
        model: nn.Module,
        averager: GradientAverager,
        *,
        precision: torch.dtype | None = None,
        scaler: GradScaler | None = None,
    ) -> None:
        self._model = model
        self._averager = averager
        self._exact = model if isinstance(model, ExactModel) else None
        self._precision = precision
        self._scaler = scaler
        self._device = next(model.parameters()).device
        self._squared_norms = SquaredNorms(averager.parameters)
        self._warned = False
        # Context managers around "forward" and "backward", for what watches them.
        self.phase: PhaseMarker = lambda name: nullcontext()

    def __call__(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        agrees: bool = True,
        prepare: Callable[[], None] | None = None,
        measure: bool = False,
    ) -> StepLosses:
        """Run all micro-batches of this rank, and ``prepare`` before the first forward.

        ``measure`` the noise of the gradient on all ranks, or on none.

        Raises:
            AgreedOutOfMemoryError: on every rank, if one runs out of memory and ``agrees``; the
                gradients then mean nothing. Otherwise that rank's own error passes.
        """
        if not micro_batches or not all(micro_batches):
            raise ValueError("every rank needs at least one micro-batch, and none may be empty")
        self._warn_once(len(micro_batches))
        run = run_together if agrees else run_alone
        images = torch.tensor([sum(map(len, micro_batches))])
        first_part = partial(self._normalizers, micro_batches, prepare)
        totals = run("the loss normalizers", first_part, images)
        if totals:
            names = sorted(totals)
            summed = ranks.sum_over_ranks(torch.stack([totals[name] for name in names]))
            totals = dict(zip(names, summed, strict=True))
        work = partial(
            self._accumulate, micro_batches, totals, int(images), joins=agrees, measure=measure
        )
        names, values, squares = run("forward or backward", work, self._averager.counts)
        self._averager.drop_unused()
        if measure:
            parts = squares.new_tensor(len(micro_batches))
            values = torch.cat([values, self._squares(squares, parts, int(images))])
        summed = ranks.sum_over_ranks(values)
        means = summed[: len(names)] / ranks.world_size()
        measured = summed[len(names) :] if measure else None
        return StepLosses(tuple(names), means, int(images), measured)

    def _squares(self, squares: Tensor, parts: Tensor, images: int) -> Tensor:
        """Return this rank's terms of ``StepLosses.squares``, whose sum over the ranks it is."""
        world_size = ranks.world_size()
        # A part's gradient is that of a rank's objective; its contribution to the mean is less.
        weighted = squares * images / world_size**2
        # All ranks have the same gradient by now.
        total = self._squared_norms.of_gradients() / world_size
        if self._scaler is not None:
            scale = self._scaler.scale(torch.ones((), device=self._device)).double()
            weighted, total = weighted / scale**2, total / scale**2
        return torch.stack([weighted, total, parts])

    def _normalizers(
        self, micro_batches: Sequence[MicroBatch], prepare: Callable[[], None] | None
    ) -> dict[str, Tensor]:
        """Return what this rank adds to the step's loss divisors; nothing for other models."""
        if prepare is not None:
            prepare()
        sums: dict[str, Tensor] = {}
        if self._exact is None:
            return sums
        for micro_batch in micro_batches:
            with torch.no_grad():
                values = self._exact.loss_normalizers(micro_batch)
            for name, value in values.items():
                value = value.to(self._device, torch.float64)
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def _accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        totals: dict[str, Tensor],
        images: int,
        *,
        joins: bool,
        measure: bool,
    ) -> tuple[list[str], Tensor, Tensor]:
        """Run all micro-batches; return loss names and their sums on this rank, float64.

        The last is the sum, if it is to ``measure``, of the squared norms of the micro-batches'
        gradients, each over its images.
        """
        exact, world_size = self._exact, ranks.world_size()
        normalizers = exact.finish_normalizers(totals, world_size) if exact else None
        sums: Tensor | None = None
        squares = torch.zeros((), dtype=torch.float64, device=self._device)
        with self._averager.taking_part(joins=joins):
            for index, micro_batch in enumerate(micro_batches):
                with self.phase("forward"):
                    losses = self._forward(micro_batch, normalizers)
                    weight = 1.0 if exact else len(micro_batch) * world_size / images
                    objective = torch.stack(list(losses.values())).sum() * weight
                first, last = index == 0, index == len(micro_batches) - 1
                with self.phase("backward"):
                    square = self._backward(objective, first=first, last=last, measure=measure)
                squares = squares + square / len(micro_batch)
                names = sorted(losses)
                # Some losses are sums of shape (1,), as detectron2 has them.
                parts = [losses[name].detach().double().reshape(()) for name in names]
                values = torch.stack(parts) * weight
                sums = values if sums is None else sums + values
        assert sums is not None
        return names, sums, squares

    def _forward(
        self, micro_batch: MicroBatch, normalizers: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        enabled = self._precision is not None
        arguments = {"normalizers": normalizers} if self._exact else {}
        with torch.autocast(self._device.type, dtype=self._precision, enabled=enabled):
            losses = self._model(micro_batch, **arguments)
        # As detectron2's trainer has it.
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def _backward(
        self, objective: Tensor, *, first: bool, last: bool, measure: bool
    ) -> Tensor | float:
        """Return the squared norm of the gradient of this pass, 0 if it is not to ``measure``."""
        if self._scaler is not None:
            objective = self._scaler.scale(objective)
        # The first pass leaves its own gradient, unless the last one averages it over the ranks.
        leaves_its_own = first and (not last or ranks.world_size() == 1)
        hooked = measure and not leaves_its_own
        watched = self._squared_norms.of_backward(watch=hooked)
        with self._averager.last_backward() if last else nullcontext(), watched as norms:
            objective.backward()
        if not measure:
            return 0.0
        return self._squared_norms.total(norms) if hooked else self._squared_norms.of_gradients()

    def _warn_once(self, micro_batches: int) -> None:
        if self._warned or (micro_batches == 1 and ranks.world_size() == 1):
            return
        self._warned = True
        if reasons := inexact_reasons(self._model):
            logger.warning(
                "Splitting a step over micro-batches or ranks is approximate for this model: %s",
                "; ".join(reasons),
            )


def cut(rank_batch: MicroBatch, ims_per_gpu: int) -> list[MicroBatch]:
    """Cut a rank's images of a step into as few and as even micro-batches as possible."""
    count = -(-len(rank_batch) // ims_per_gpu)
    samples = iter(rank_batch)
    return [list(islice(samples, size)) for size in split_evenly(len(rank_batch), count)]


def inexact_reasons(model: nn.Module) -> tuple[str, ...]:
    """Return why a split step of ``model`` is not exactly the step of one batch; empty: it is."""
    reasons = []
    if not isinstance(model, ExactModel):
        reasons.append(
            f"{type(model).__name__} does not tell its loss normalizers, so the losses of a "
            "micro-batch count by its images"
        )
    if trained := trained_norms(model):
        reasons.append(
            f"{len(trained)} batch norm layers (the first is {trained[0]}) take their statistics "
            "from one micro-batch"
        )
    return tuple(reasons)
