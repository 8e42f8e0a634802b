"""Forward and backward of one optimizer step: micro-batches, virtual ranks, adding up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from d2scale.step import ranks
from d2scale.step.agreement import run_alone, run_together
from d2scale.step.averaging import GradientAverager
from d2scale.step.micro_batches import (
    ExactModel,
    MicroBatch,
    PhaseMarker,
    StepLosses,
    inexact_reasons,
)
from d2scale.step.noise import SquaredNorms
from d2scale.step.ordered_sum import OrderedSum
from d2scale.step.virtual_ranks import VirtualRanks

logger = logging.getLogger(__name__)

Forward = Callable[[MicroBatch], Any]
# A micro-batch and the virtual rank that it belongs to, None without virtual ranks.
Part = tuple[int | None, MicroBatch]


class ForwardBackward:
    """Adds the gradients of one optimizer step to ``.grad``, as means over the ranks.

    The ranks may have different numbers of micro-batches and of images, but every rank makes the
    same collective calls. The model is bare, in training mode; called with a micro-batch (and
    ``normalizers``, if it is an :class:`ExactModel`), it returns its losses by name.

    With ``virtual_ranks`` the means are over those, and ``split_model`` takes the forwards of one
    whose images do not fit into one micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        averager: GradientAverager | OrderedSum,
        *,
        precision: torch.dtype | None = None,
        scaler: GradScaler | None = None,
        virtual_ranks: VirtualRanks | None = None,
        split_model: ExactModel | None = None,
    ) -> None:
        self._model = model
        self._averager = averager
        self._virtual_ranks = virtual_ranks
        self._exact = model if isinstance(model, ExactModel) else None
        self._split_model = self._exact or split_model
        self._precision = precision
        self._scaler = scaler
        self._device = next(model.parameters()).device
        self._squared_norms = SquaredNorms(averager.parameters)
        self._warned = False
        # Context managers around "forward" and "backward", for what watches them.
        self.phase: PhaseMarker = lambda name: nullcontext()

    def __call__(
        self,
        parts: Sequence[Part],
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
        if not parts or not all(micro_batch for _, micro_batch in parts):
            raise ValueError("every rank needs at least one micro-batch, and none may be empty")
        self._warn_once(parts)
        run = run_together if agrees else run_alone
        images = torch.tensor([sum(len(micro_batch) for _, micro_batch in parts)])
        totals = run("the loss normalizers", partial(self._totals, parts, prepare), images)
        if totals:
            names = sorted(totals)
            summed = ranks.sum_over_ranks(torch.stack([totals[name] for name in names]))
            totals = dict(zip(names, summed, strict=True))
        work = partial(self._accumulate, parts, totals, int(images), joins=agrees, measure=measure)
        names, values, squares = run("forward or backward", work, self._averager.counts)
        self._averager.finish()
        if measure:
            values = torch.cat([values, self._squares(squares, len(parts), int(images))])
        summed = ranks.sum_over_ranks(values)
        measured = summed[len(names) :] if measure else None
        return StepLosses(tuple(names), summed[: len(names)], int(images), measured)

    def _squares(self, squares: Tensor, parts: int, images: int) -> Tensor:
        """Return this rank's terms of ``StepLosses.squares``, whose sum over the ranks it is."""
        weighted = squares * images / self._averager.divisor**2
        # All ranks have the same gradient by now.
        total = self._squared_norms.of_gradients() / ranks.world_size()
        if self._scaler is not None:
            scale = self._scaler.scale(torch.ones((), device=self._device)).double()
            weighted, total = weighted / scale**2, total / scale**2
        return torch.stack([weighted, total, squares.new_tensor(parts)])

    def _totals(
        self, parts: Sequence[Part], prepare: Callable[[], None] | None
    ) -> dict[str, Tensor]:
        """Return what this rank adds to the whole step's loss normalizers, if it has such."""
        totals = {}
        if self._exact is not None and self._virtual_ranks is None:
            totals = self._sums(self._exact, parts)
        # After them: a model that reads a value would wait for all copies to the host.
        if prepare is not None:
            prepare()
        return totals

    def _sums(self, exact: ExactModel, parts: Sequence[Part]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for _, micro_batch in parts:
            with torch.no_grad():
                values = exact.loss_normalizers(micro_batch)
            for name, value in values.items():
                value = value.to(self._device, torch.float64)
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def _accumulate(
        self,
        parts: Sequence[Part],
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
        sums: dict[str, Tensor] = {}
        squares = torch.zeros((), dtype=torch.float64, device=self._device)
        done = 0
        with self._averager.taking_part(joins=joins):
            for number, members in groupby(parts, key=itemgetter(0)):
                group = list(members)
                with self._turn_of(number):
                    forward, share = self._forward_of(group, totals)
                    for _, micro_batch in group:
                        weight = share or len(micro_batch) / images
                        with self.phase("forward"):
                            losses = self._losses(forward, micro_batch)
                            objective = torch.stack(list(losses.values())).sum()
                            objective = objective * (weight * self._averager.divisor)
                        done += 1
                        first, last = done == 1, done == len(parts)
                        with self.phase("backward"):
                            square = self._backward(
                                objective, first=first, last=last, measure=measure
                            )
                        squares = squares + square / len(micro_batch)
                        _add(sums, losses, weight)
                self._averager.end_virtual_rank()
        names = sorted(sums)
        return names, torch.stack([sums[name] for name in names]), squares

    def _turn_of(self, number: int | None) -> AbstractContextManager[None]:
        if self._virtual_ranks is None or number is None:
            return nullcontext()
        return self._virtual_ranks.running(number)

    def _forward_of(
        self, group: Sequence[Part], totals: dict[str, Tensor]
    ) -> tuple[Forward, float | None]:
        """Return what computes the losses of a virtual rank's or rank's micro-batches.

        The second is the share of each micro-batch's losses in the step's; None: that of its
        images.
        """
        virtual = self._virtual_ranks
        if virtual is None:
            if self._exact is None:
                return self._model, None
            world_size = ranks.world_size()
            normalizers = self._exact.finish_normalizers(totals, world_size)
            return partial(self._model, normalizers=normalizers), 1 / world_size
        # A virtual rank in one forward is run as the cluster runs it.
        exact = self._exact or (self._split_model if len(group) > 1 else None)
        if exact is None:
            return self._model, None
        normalizers = exact.finish_normalizers(self._sums(exact, group), 1)
        return partial(exact, normalizers=normalizers), 1 / virtual.count

    def _losses(self, forward: Forward, micro_batch: MicroBatch) -> dict[str, Tensor]:
        enabled = self._precision is not None
        with torch.autocast(self._device.type, dtype=self._precision, enabled=enabled):
            losses = forward(micro_batch)
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

    def _warn_once(self, parts: Sequence[Part]) -> None:
        virtual = self._virtual_ranks
        whole = ranks.world_size() if virtual is None else len(virtual.own)
        if self._warned or (len(parts) == whole and (virtual is not None or whole == 1)):
            return
        self._warned = True
        exact = self._exact if virtual is None else self._split_model
        if reasons := inexact_reasons(self._model, exact, one_forward=len(parts) == 1):
            logger.warning(
                "Splitting %s is approximate for this model: %s",
                "a step over micro-batches or ranks" if virtual is None else "a virtual rank",
                "; ".join(reasons),
            )


def _add(sums: dict[str, Tensor], losses: Mapping[str, Tensor], weight: float) -> None:
    for name, loss in losses.items():
        # Some losses are sums of shape (1,), as detectron2 has them.
        value = loss.detach().double().reshape(()) * weight
        sums[name] = sums[name] + value if name in sums else value
