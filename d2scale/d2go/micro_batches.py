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
from d2scale.run_folder.contents import write_plan
from d2scale.step.guard import StepDoesNotFitError
from d2scale.step.micro_batches import StepLosses
from d2scale.step.optimizer_step import OptimizerStep, StepOptions

logger = logging.getLogger(__name__)


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
                self.trainer, self._step(ims_per_gpu), self._save_last_step
            )
        elif ims_per_gpu < share:
            with exit_on_user_error():
                allowed = f"{share}, the images of a GPU, with {obstacle}"
                advice = "let a step be one forward, or train with a plain model and trainer"
                raise ConfigError([Fault("D2SCALE.IMS_PER_GPU", ims_per_gpu, allowed, advice)])
        else:
            logger.warning("An out-of-memory error ends this run: d2go trains it with %s", obstacle)

    def _step(self, ims_per_gpu: int) -> OptimizerStep:
        trainer, model = self.trainer, self.trainer.model
        options = StepOptions(
            precision=getattr(trainer, "precision", None),
            scaler=getattr(trainer, "grad_scaler", None),
            on_oom=self._cfg.D2SCALE.ON_OOM,
            compress=torch.float16 if self._cfg.MODEL.DDP_FP16_GRAD_COMPRESS else None,
        )
        return OptimizerStep(
            model.module if isinstance(model, DistributedDataParallel) else model,
            trainer.optimizer,
            ims_per_gpu=ims_per_gpu,
            options=options,
            on_split=self._record_split,
        )

    def _record_split(self, ims_per_gpu: int) -> None:
        if self._plan is not None:
            self._plan = self._plan.with_smaller_micro_batches(ims_per_gpu)
            if comm.is_main_process():
                write_plan(Path(self._cfg.OUTPUT_DIR), self._plan)

    def _save_last_step(self) -> None:
        last = self.trainer.iter - 1
        if last >= self.trainer.start_iter:
            self._checkpointer.save(f"model_{last:07d}", iteration=last)


class RunStep:
    """One step as ``SimpleTrainer`` and ``AMPTrainer`` take it, with the same events around it.

    Args:
        trainer: whose data and hooks are used.
        step: around the trainer's model and optimizer.
        save_last_step: called when a step does not fit at all.
    """

    def __init__(
        self, trainer: SimpleTrainer, step: OptimizerStep, save_last_step: Callable[[], None]
    ) -> None:
        self._trainer = trainer
        self._step = step
        self._save_last_step = save_last_step

    def __call__(self) -> None:
        trainer = self._trainer
        start = time.perf_counter()
        share = _padded_alike(next(trainer._data_loader_iter))
        data_seconds = time.perf_counter() - start
        try:
            losses = self._step(share, self._before_update)
        except StepDoesNotFitError:
            self._save_last_step()
            with exit_on_user_error():
                raise
        # The same on every rank, so detectron2's mean over ranks changes nothing.
        values = {name: torch.tensor(value) for name, value in losses.losses.items()}
        trainer._write_metrics(values, data_seconds)

    def _before_update(self, losses: StepLosses) -> None:
        trainer = self._trainer
        _check_finite(losses, trainer.iter)
        # At every attempt: hooks may change the gradients.
        trainer.after_backward()
        if getattr(trainer, "log_grad_scaler", False):
            scale = trainer.grad_scaler.get_scale()
            get_event_storage().put_scalar("[metric]grad_scaler", scale)


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
