"""Steps in micro-batches, guarded against out-of-memory errors, inside d2go's own training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import detectron2.utils.comm as comm
import torch
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2scale.d2go.config import exit_on_user_error
from d2scale.d2go.scaling_methods import applied_plan
from d2scale.errors import ConfigError, Fault
from d2scale.planning.rules import micro_batch_sizes
from d2scale.run_folder.contents import write_plan
from d2scale.step.guard import OomGuard, StepDoesNotFitError
from d2scale.step.micro_batches import MicroBatchStep, StepLosses, cut, synchronised_norms

logger = logging.getLogger(__name__)

Take = Callable[[Sequence[Any], Callable[[StepLosses], None]], StepLosses]


class MicroBatches(HookBase):
    """Gives the trainer another ``run_step``: its batch in micro-batches, under the guard.

    detectron2 means ``run_step`` to be replaced. A trainer that is not plainly
    ``SimpleTrainer`` or ``AMPTrainer``, or has another wrapper than ``DistributedDataParallel``,
    keeps its own.

    Args:
        cfg: the config that runs, scaled.
        checkpointer: keeps the last good step when one image does not fit.
    """

    def __init__(self, cfg: Any, checkpointer: Any) -> None:
        self._cfg = cfg
        self._checkpointer = checkpointer
        self._plan = applied_plan(cfg)

    def before_train(self) -> None:
        """Replace the trainer's step.

        Ends the process if the plan needs micro-batches and the trainer cannot have them.
        """
        share = self._cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        asked = self._plan.ims_per_gpu if self._plan else self._cfg.D2SCALE.IMS_PER_GPU
        ims_per_gpu = min(asked or share, share)
        guarded = self._cfg.D2SCALE.ON_OOM == "split"
        if ims_per_gpu == share and not guarded:
            return
        obstacle = _obstacle(self.trainer)
        if not obstacle:
            self.trainer.run_step = RunStep(
                self.trainer, self._take(ims_per_gpu, guarded), self._save_last_step
            )
        elif ims_per_gpu < share:
            with exit_on_user_error():
                allowed = f"{share}, the images of a GPU, with {obstacle}"
                advice = "let a step be one forward, or train with a plain model and trainer"
                raise ConfigError([Fault("D2SCALE.IMS_PER_GPU", ims_per_gpu, allowed, advice)])
        else:
            logger.warning("An out-of-memory error ends this run: d2go trains it with %s", obstacle)

    def _take(self, ims_per_gpu: int, guarded: bool) -> Take:
        trainer = self.trainer
        options = {
            "precision": getattr(trainer, "precision", None),
            "scaler": getattr(trainer, "grad_scaler", None),
        }
        if guarded and comm.get_world_size() > 1 and synchronised_norms(trainer.model):
            logger.warning(
                "An out-of-memory error ends this run: synchronised batch norm makes ranks wait "
                "for each other inside a forward"
            )
            guarded = False
        if not guarded:
            return Unguarded(MicroBatchStep(trainer.model, **options), trainer, ims_per_gpu)
        guard = OomGuard(
            trainer.model,
            trainer.optimizer,
            ims_per_batch=self._cfg.SOLVER.IMS_PER_BATCH,
            ims_per_gpu=ims_per_gpu,
            on_split=self._record_split,
            **options,
        )

        def take(share: Sequence[Any], finish: Callable[[StepLosses], None]) -> StepLosses:
            # Quantization-aware training changes the loader's batch on the way.
            guard.ims_per_batch = len(share) * comm.get_world_size()
            return guard(share, finish)

        return take

    def _record_split(self, ims_per_gpu: int) -> None:
        if self._plan is not None:
            self._plan = self._plan.with_smaller_micro_batches(ims_per_gpu)
            if comm.is_main_process():
                write_plan(Path(self._cfg.OUTPUT_DIR), self._plan)

    def _save_last_step(self) -> None:
        last = self.trainer.iter - 1
        if last >= self.trainer.start_iter:
            self._checkpointer.save(f"model_{last:07d}", iteration=last)


class Unguarded:
    """Takes a step in micro-batches; an out-of-memory error passes through."""

    def __init__(self, step: MicroBatchStep, trainer: SimpleTrainer, ims_per_gpu: int) -> None:
        self._step = step
        self._trainer = trainer
        self._ims_per_gpu = ims_per_gpu

    def __call__(self, share: Sequence[Any], finish: Callable[[StepLosses], None]) -> StepLosses:
        self._trainer.optimizer.zero_grad()
        (sizes,) = micro_batch_sizes(len(share), 1, self._ims_per_gpu)
        losses = self._step(cut(share, sizes))
        finish(losses)
        return losses


class RunStep:
    """One step as ``SimpleTrainer`` and ``AMPTrainer`` take it, with the same events around it.

    Args:
        trainer: whose model, data and optimizer are used.
        take: forward and backward of a share.
        save_last_step: called when a step does not fit at all.
    """

    def __init__(
        self, trainer: SimpleTrainer, take: Take, save_last_step: Callable[[], None]
    ) -> None:
        self._trainer = trainer
        self._take = take
        self._save_last_step = save_last_step

    def __call__(self) -> None:
        trainer = self._trainer
        start = time.perf_counter()
        share = _padded_alike(next(trainer._data_loader_iter))
        data_seconds = time.perf_counter() - start
        told: list[StepLosses] = []

        def finish(losses: StepLosses) -> None:
            _check_finite(losses, trainer.iter)
            # Once, even if the update has to be taken again.
            if not told:
                told.append(losses)
                trainer.after_backward()
            self._update()

        try:
            losses = self._take(share, finish)
        except StepDoesNotFitError:
            self._save_last_step()
            with exit_on_user_error():
                raise
        # The same on every rank, so detectron2's mean over ranks changes nothing.
        values = {name: torch.tensor(value) for name, value in losses.losses.items()}
        trainer._write_metrics(values, data_seconds)

    def _update(self) -> None:
        trainer = self._trainer
        if not hasattr(trainer, "grad_scaler"):
            trainer.optimizer.step()
            return
        if trainer.log_grad_scaler:
            scale = trainer.grad_scaler.get_scale()
            get_event_storage().put_scalar("[metric]grad_scaler", scale)
        trainer.grad_scaler.step(trainer.optimizer)
        trainer.grad_scaler.update()


def _obstacle(trainer: SimpleTrainer) -> str:
    """What about a trainer keeps its step from being replaced; empty: nothing."""
    # Through the proxy that a hook has.
    kind = trainer.__class__
    if kind not in (SimpleTrainer, AMPTrainer):
        return f"the trainer {kind.__name__}"
    if kind is AMPTrainer and not torch.cuda.is_available():
        return "AMP, which needs CUDA"
    model = trainer.model
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    return "" if _is_plain(bare) else f"the wrapper {type(bare).__name__}"


def _is_plain(model: nn.Module) -> bool:
    name = type(model).__name__
    return "FullyShardedDataParallel" not in name and name != "AbnormalLossCheckerWrapper"


def _padded_alike(share: Sequence[Any]) -> list[Any]:
    """Tell every image the size that detectron2 would pad the whole share to."""
    images = [sample["image"] for sample in share if "image" in sample]
    if len(images) < len(share):
        return list(share)
    pad_to = tuple(max(image.shape[side] for image in images) for side in (1, 2))
    return [{**sample, "pad_to": pad_to} for sample in share]


def _check_finite(losses: StepLosses, iteration: int) -> None:
    # In detectron2's words, and on every rank: the losses are those of the whole step.
    if not math.isfinite(losses.total):
        raise FloatingPointError(
            f"Loss became infinite or NaN at iteration={iteration}!\nloss_dict = {losses.losses}"
        )
