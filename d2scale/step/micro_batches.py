"""One optimizer step in several micro-batches, with the gradient of the one big batch.

A detection loss is a sum over locations or boxes, divided by a count that is known only for the
whole batch (the positives, say). Averaging the losses of micro-batches therefore trains another
objective. A model that can name its counts from the ground truth alone makes the split exact:
the counts are summed over all micro-batches and ranks before the first forward, and every
forward divides by the same totals.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from d2scale.step.agreement import Agreement

logger = logging.getLogger(__name__)

Sample = Mapping[str, Any]
MicroBatch = Sequence[Sample]
T = TypeVar("T")

# Among the sums of a step; no loss has this name.
_IMAGES = ""
# detectron2's own; d2go's default for training on several GPUs.
_NAIVE_SYNC_BATCH_NORM = "NaiveSyncBatchNorm"


@runtime_checkable
class ExactModel(Protocol):
    """What a model offers so that its step can be split without changing it."""

    def loss_normalizers(self, samples: MicroBatch) -> dict[str, Tensor]:
        """Return float64 scalars, sums over ``samples``, from their ground truth only."""

    def finish_normalizers(self, totals: dict[str, Tensor], world_size: int) -> dict[str, Tensor]:
        """Turn the totals of a step into the divisors of one rank's losses."""


@dataclass(frozen=True)
class StepLosses:
    """The losses of one optimizer step, as the one big batch would report them.

    Attributes:
        losses: value by loss name, the same on every rank.
        images: images in the step, over all ranks and micro-batches.
    """

    losses: dict[str, float]
    images: int

    @property
    def total(self) -> float:
        return sum(self.losses.values())


class MicroBatchStep:
    """Forward and backward of one optimizer step over this rank's micro-batches.

    Gradients are added to ``.grad`` (the caller zeroes them) and, under
    ``DistributedDataParallel``, averaged over ranks in the backward of the last micro-batch
    only. The ranks may hold different numbers of micro-batches and of images. Every rank makes
    the same collective calls: one before the first forward, DDP's own, one after the last
    backward. With an ``agreement`` there are none of DDP's: it averages after the last backward.

    Args:
        model: in training mode, bare or wrapped in ``DistributedDataParallel``; called with a
            micro-batch (and ``normalizers``, if it is an :class:`ExactModel`), it returns its
            losses by name.
        precision: dtype of autocast; None: off.
        scaler: scales the losses before backward, with float16.
        agreement: if given, a rank that runs out of memory takes the others out of the step
            (:class:`AgreedOutOfMemoryError`) instead of leaving them waiting.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: torch.dtype | None = None,
        scaler: GradScaler | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        self._model = model
        self._bare = model.module if isinstance(model, DistributedDataParallel) else model
        self._exact = self._bare if isinstance(self._bare, ExactModel) else None
        self._precision = precision
        self._scaler = scaler
        self._agreement = agreement
        self._told_reasons = False

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> StepLosses:
        if not micro_batches or not all(micro_batches):
            raise ValueError("every rank needs at least one micro-batch, and none may be empty")
        self._tell_reasons_once(len(micro_batches))
        names, sums = self._run("the loss normalizers", partial(self._sums, micro_batches))
        totals = dict(zip(names, _all_reduce(sums), strict=True))
        images, losses, values = self._run(
            "forward or backward", partial(self._accumulate, micro_batches, totals)
        )
        if self._agreement is not None:
            self._agreement.average_gradients()
        means = [value / _world_size() for value in _all_reduce(values).tolist()]
        return StepLosses(dict(zip(losses, means, strict=True)), images)

    def _run(self, part: str, work: Callable[[], T]) -> T:
        return work() if self._agreement is None else self._agreement.run(part, work)

    def _sums(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[str], Tensor]:
        """Names and values of what this rank adds to the step's images and loss divisors."""
        device = next(self._bare.parameters()).device
        images = sum(len(micro_batch) for micro_batch in micro_batches)
        sums = {_IMAGES: torch.tensor(images, dtype=torch.float64, device=device)}
        if self._exact:
            for micro_batch in micro_batches:
                with torch.no_grad():
                    found = self._exact.loss_normalizers(micro_batch)
                for name, value in found.items():
                    value = value.to(device, torch.float64)
                    sums[name] = sums[name] + value if name in sums else value
        names = sorted(sums)
        return names, torch.stack([sums[name] for name in names])

    def _accumulate(
        self, micro_batches: Sequence[MicroBatch], totals: dict[str, Tensor]
    ) -> tuple[int, list[str], Tensor]:
        """Add up this rank's gradients.

        Returns:
            Images of the whole step, names of the losses, and their sums over this rank's
            micro-batches, shape (names,), float64.
        """
        totals = dict(totals)
        images = round(totals.pop(_IMAGES).item())
        normalizers = None
        if self._exact:
            normalizers = self._exact.finish_normalizers(totals, _world_size())
        names: list[str] = []
        sums: Tensor | None = None
        for index, micro_batch in enumerate(micro_batches):
            with self._synchronised(last=index == len(micro_batches) - 1):
                losses = self._forward(micro_batch, normalizers)
                weight = 1.0 if self._exact else len(micro_batch) * _world_size() / images
                self._backward(losses, weight)
            names = sorted(losses)
            values = torch.stack([losses[name].detach().double() for name in names]) * weight
            sums = values if sums is None else sums + values
        assert sums is not None
        return images, names, sums

    def _forward(
        self, micro_batch: MicroBatch, normalizers: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        device_type = next(self._bare.parameters()).device.type
        enabled = self._precision is not None
        with torch.autocast(device_type, dtype=self._precision, enabled=enabled):
            if self._exact:
                return self._model(micro_batch, normalizers=normalizers)
            losses = self._model(micro_batch)
        # As detectron2's trainer has it.
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def _backward(self, losses: Mapping[str, Tensor], weight: float) -> None:
        objective = torch.stack(list(losses.values())).sum() * weight
        if self._scaler is not None:
            objective = self._scaler.scale(objective)
        objective.backward()

    def _synchronised(self, *, last: bool) -> AbstractContextManager[None]:
        if not isinstance(self._model, DistributedDataParallel):
            return nullcontext()
        # DDP averages in the middle of a backward, where no rank may fail.
        return nullcontext() if last and self._agreement is None else self._model.no_sync()

    def _tell_reasons_once(self, micro_batches: int) -> None:
        if self._told_reasons or (micro_batches == 1 and _world_size() == 1):
            return
        self._told_reasons = True
        reasons = inexact_reasons(self._bare)
        if reasons:
            logger.warning(
                "Splitting a step over micro-batches or ranks is approximate for this model: %s",
                "; ".join(reasons),
            )


def cut(share: MicroBatch, sizes: Sequence[int]) -> list[MicroBatch]:
    """Cut a rank's share of a step into micro-batches of the given sizes."""
    assert len(share) == sum(sizes), f"{len(share)} images for micro-batches of {sizes}"
    samples = iter(share)
    return [list(islice(samples, size)) for size in sizes]


def inexact_reasons(model: nn.Module) -> tuple[str, ...]:
    """Why a split step of ``model`` is not exactly the step of the one big batch; empty: it is."""
    reasons = []
    if not isinstance(model, ExactModel):
        reasons.append(
            f"{type(model).__name__} does not tell its loss normalizers, so the losses of a "
            "micro-batch count by its images"
        )
    trained = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training
    ]
    if trained:
        reasons.append(
            f"{len(trained)} batch norm layers (the first is {trained[0]}) take their statistics "
            "from one micro-batch"
        )
    return tuple(reasons)


def synchronised_norms(model: nn.Module) -> tuple[str, ...]:
    """Names of the batch norm layers of ``model`` that communicate in their forward."""
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.SyncBatchNorm) or type(module).__name__ == _NAIVE_SYNC_BATCH_NORM
    )


def without_synchronised_norms(model: nn.Module) -> nn.Module:
    """Return ``model`` with plain batch norm for one rank, and log the change if there is one."""
    found = [name for name, each in model.named_modules() if isinstance(each, nn.SyncBatchNorm)]
    if found:
        logger.info(
            "%d synchronised batch norm layers become plain ones, for there is one rank (the "
            "first is %s)",
            *(len(found), found[0]),
        )
    for name in found:
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, _plain_norm(model.get_submodule(name)))
    return model


def _plain_norm(norm: nn.Module) -> nn.BatchNorm2d:
    assert isinstance(norm, nn.SyncBatchNorm)
    plain = nn.BatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    # The very tensors: an optimizer may hold them.
    plain._parameters, plain._buffers = norm._parameters, norm._buffers
    return plain.train(norm.training)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_reduce(values: Tensor) -> Tensor:
    """Sum ``values`` over ranks; themselves on one."""
    if _world_size() > 1:
        dist.all_reduce(values)
    return values
