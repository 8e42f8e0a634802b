"""d2scale's optimizer step in the place of detectron2's own, with the same events around it."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, TrainerBase
from detectron2.utils.events import get_event_storage

from d2scale.detectron2.hook_states import HookStates
from d2scale.detectron2.private_upstream import (
    FULLY_SHARDED,
    hooks_after_backward,
    taking_steps,
    without_gradient_buckets,
)
from d2scale.detectron2.progress import ProgressRecord
from d2scale.detectron2.rates import rates_kept, set_rates
from d2scale.detectron2.scaling import applied_plan
from d2scale.detectron2.step import build_step
from d2scale.detectron2.step_data import Layout, StepData
from d2scale.detectron2.step_state import StepState
from d2scale.detectron2.user_errors import (
    exit_alone_on_user_error,
    exit_together_on_user_error,
)
from d2scale.errors import ConfigError, Fault
from d2scale.planning.rules import LR_RULE
from d2scale.planning.schedule import follows_gain
from d2scale.run_folder.contents import write_plan
from d2scale.step import ranks
from d2scale.step.guard import StepDoesNotFitError
from d2scale.step.micro_batches import StepLosses
from d2scale.step.optimizer_step import OptimizerStep

logger = logging.getLogger(__name__)


class RunStep(HookBase):
    """Gives the trainer another ``run_step``, which detectron2 means to be replaced.

    It takes one step as ``SimpleTrainer`` and ``AMPTrainer`` do, with the same events around it.
    Another trainer, or another wrapper of the model than ``DistributedDataParallel``, keeps its
    own step. An engine built on detectron2 overrides what it does in its own way.

    Args:
        cfg: the config that runs, scaled.
        checkpointer: saves the last good step when one image does not fit.
        record: of this run, in its checkpoints; None: there is none.
        state: of the steps, in its checkpoints; None: there is none.
    """

    engine = "detectron2"
    always = True  # whether every step is taken here, also one that needs nothing of d2scale
    # Of the model, that keep their own step.
    wrappers: tuple[type, ...] = FULLY_SHARDED

    def __init__(
        self,
        cfg: Any,
        checkpointer: Any,
        record: ProgressRecord | None = None,
        state: StepState | None = None,
    ) -> None:
        self._cfg = cfg
        self._checkpointer = checkpointer
        self._record = record or ProgressRecord(cfg, engine=self.engine)
        self._state = state
        self._virtual_ranks = state.virtual_ranks if state else None
        self._data: StepData | None = None
        self._clock = self._record.clock
        self._by_gain = follows_gain(cfg)
        self._losses: StepLosses | None = None  # of the last step
        self._data_seconds = 0.0  # of an iteration, as the last step had it
        self._lr = 0.0  # of the last step, in the first group of parameters
        self.iteration_seconds: float | None = None  # as the last step had it; None before
        self._plan = applied_plan(cfg)
        self.inner: Any = None  # the trainer that takes the steps
        self._step: OptimizerStep | None = None
        self._hook_states: HookStates | None = None
        self._attempts = 0

    def before_train(self) -> None:
        """Replace the trainer's step.

        Ends the process if the plan needs micro-batches or the gain rule, and the trainer cannot
        have them.
        """
        rank_images = self._cfg.SOLVER.IMS_PER_BATCH // ranks.world_size()
        asked = self._plan.ims_per_gpu if self._plan else self._cfg.D2SCALE.IMS_PER_GPU
        ims_per_gpu = min(asked or rank_images, rank_images)
        splits = ims_per_gpu < rank_images or self._virtual_ranks is not None
        # A batch that fills the memory was measured with this step, not with the engine's.
        measured = self._plan is not None and self._plan.method == "max_memory"
        splits_on_oom = self._cfg.D2SCALE.ON_OOM != "raise"
        if not (splits or measured or self._by_gain or splits_on_oom or self.always):
            return
        obstacle, plain = self.obstacle(), "or train with a plain model and trainer"
        if not obstacle:
            self._replace(ims_per_gpu)
        elif self._by_gain:
            allowed = f"linear, sqrt or none with {obstacle}"
            _refuse(LR_RULE, "gain", allowed, f"take linear, {plain}")
        elif splits:
            allowed = f"{rank_images}, the images of a GPU, with {obstacle}"
            advice = f"let a step be one forward, {plain}"
            _refuse("D2SCALE.IMS_PER_GPU", ims_per_gpu, allowed, advice)
        else:
            text = "An out-of-memory error ends this run: %s trains it with %s"
            logger.warning(text, self.engine, obstacle)

    def run_step(self) -> None:
        """Take the optimizer steps of one iteration of the schedule.

        That is one. By the gain rule, where an iteration is a step of the recipe, it is none where
        the step before was worth this one too, and several where a step is worth less than one.
        """
        if not self._by_gain:
            self._take_step()
        else:
            while self._clock.iterations < self.trainer.iter + 1:
                self._take_step()
        # In every iteration, also with the step before: what is written of it stays together.
        if self._losses is not None and self._writes_losses():
            self._write_metrics(self._losses)

    def after_step(self) -> None:
        """Show the learning rate of the last step; the engine shows the scheduler's."""
        if self._by_gain and self._losses is not None:
            get_event_storage().put_scalar("lr", self._lr, smoothing_hint=False)

    def build_step(self, **options: Any) -> OptimizerStep:
        """Return the trainer's step; ``options`` are those of the engine's ``build_step``."""
        return build_step(self._cfg, self.inner.model, self.inner.optimizer, **options)

    def obstacle(self) -> str:
        """Return why a trainer's step cannot be replaced; empty: it can."""
        return self.obstacle_of(self.trainer)

    @classmethod
    def obstacle_of(cls, trainer: TrainerBase) -> str:
        """Return why the step of ``trainer`` cannot be replaced; empty: it can."""
        # Through the proxy that a hook has.
        outer = trainer.__class__
        if issubclass(outer, DefaultTrainer) and outer.run_step is not DefaultTrainer.run_step:
            return f"the run_step of {outer.__name__}"
        inner = taking_steps(trainer)
        kind = inner.__class__
        if kind not in (SimpleTrainer, AMPTrainer):
            return f"the trainer {kind.__name__}"
        if kind is AMPTrainer and not torch.cuda.is_available():
            return "AMP, which needs CUDA"
        wrapper = type(inner.model)
        return f"the wrapper {wrapper.__name__}" if issubclass(wrapper, cls.wrappers) else ""

    def state_holders(self) -> Sequence[Any]:
        """Return the objects whose attributes are the state of hooks that act after a backward."""
        return hooks_after_backward(self.inner)

    def follow_gain(self, gain: float) -> None:
        """Let what the engine updates between backward and update count for ``gain`` steps."""

    @exit_alone_on_user_error()
    def _take_step(self) -> None:
        assert self._step is not None
        assert self._hook_states is not None
        assert self._data is not None
        trainer, clock = self.inner, self._clock
        start = time.perf_counter()
        rank_batch = self._data.read()
        data_seconds = time.perf_counter() - start
        self._attempts = 0
        measure = clock.measures(one_part=self._step.is_one_part(rank_batch))
        try:
            with rates_kept(trainer.optimizer) as rates:
                before_update = partial(self._before_update, rates)
                self._losses = self._step(
                    rank_batch, before_update, measure=measure, number=clock.number
                )
                self._lr = trainer.optimizer.param_groups[0]["lr"]
        except StepDoesNotFitError:
            if self._attempts:
                self._hook_states.restore()
            self._save_last_step()
            with exit_together_on_user_error():
                raise
        clock.advance()
        if self._state is not None:
            self._state.place = self._data.place()
        self._record.images_seen += self._losses.images
        self._data_seconds = data_seconds / clock.gain
        self.iteration_seconds = (time.perf_counter() - start) / clock.gain

    def _write_metrics(self, losses: StepLosses) -> None:
        trainer, clock = self.inner, self._clock
        # The same on every rank, so detectron2's mean over ranks changes nothing.
        values = {name: torch.tensor(value) for name, value in losses.losses.items()}
        trainer.write_metrics(values, self._data_seconds, trainer.iter)
        scalars = {} if clock.noise_scale is None else {"noise_scale": clock.noise_scale}
        if self._by_gain:
            scalars |= {"gain": clock.gain, "recipe_steps": clock.iterations, "steps": clock.steps}
            scalars["images_seen"] = self._record.images_seen
        get_event_storage().put_scalars(smoothing_hint=False, **scalars)

    def _replace(self, ims_per_gpu: int) -> None:
        trainer = self.inner = taking_steps(self.trainer)
        trainer.model = without_gradient_buckets(trainer.model)
        self._step = self.build_step(
            ims_per_gpu=ims_per_gpu,
            precision=getattr(trainer, "precision", None),
            scaler=getattr(trainer, "grad_scaler", None),
            virtual_ranks=self._virtual_ranks,
            on_new_size=self._record_size,
        )
        if self._state is not None:
            self._state.keep_size(self._step.size)
            if self._step.ims_per_gpu != ims_per_gpu:
                self._record_size(self._step.ims_per_gpu)
        self._data = self._open_data(trainer)
        self._hook_states = HookStates(self.state_holders())
        if self._by_gain:
            # torch warns of a resumed run that begins with an iteration without a step.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step")
        trainer.run_step = self.run_step

    def _before_update(self, rates: list[float], losses: StepLosses) -> None:
        assert self._step is not None
        assert self._hook_states is not None
        trainer = self.inner
        if self._by_gain or self._writes_losses():
            _check_finite(losses, trainer.iter)
        if self._attempts:
            self._hook_states.restore()
        else:
            self._hook_states.remember()
            if getattr(trainer, "log_grad_scaler", False):
                scale = trainer.grad_scaler.get_scale()
                get_event_storage().put_scalar("[metric]grad_scaler", scale)
        self._attempts += 1
        gain = self._clock.gain_with(losses)
        if self._by_gain:
            set_rates(trainer.optimizer, rates, gain)
            self._step.set_gain(gain)
            self.follow_gain(gain)
        # Hooks may change the gradients, and another attempt has others.
        trainer.after_backward()

    def _writes_losses(self) -> bool:
        # Reading losses waits for the device.
        return bool((self.inner.iter + 1) % self.inner.gather_metric_period == 0)

    def _open_data(self, trainer: SimpleTrainer) -> StepData:
        timeout = self._cfg.D2SCALE.LOADER_TIMEOUT_SECONDS
        if self._plan is None or not (self.always or self._virtual_ranks):
            if self._record.images_seen:
                logger.info("detectron2's sampler begins its order anew")
            return StepData(trainer, None, timeout)
        data = StepData(trainer, Layout.of_plan(self._plan), timeout)
        if self._state is not None:
            with exit_together_on_user_error():
                place = self._state.place if self._record.keeps_order else None
                data.begin_at(place, self._record.images_seen if self._record.keeps_order else 0)
            self._state.place = data.place()
        return data

    def _record_size(self, ims_per_gpu: int) -> None:
        if self._plan is not None:
            self._plan = self._plan.with_micro_batches_of(ims_per_gpu)
            if ranks.rank() == 0:
                write_plan(Path(self._cfg.OUTPUT_DIR), self._plan)

    def _save_last_step(self) -> None:
        if self._state is not None:
            self._state.gather()
        last = self.trainer.iter - 1
        if last >= self.trainer.start_iter:
            self._checkpointer.save(f"model_{last:07d}", iteration=last)


def _refuse(key: str, value: Any, allowed: str, advice: str) -> None:
    with exit_together_on_user_error():
        raise ConfigError([Fault(key, value, allowed, advice)])


def _check_finite(losses: StepLosses, iteration: int) -> None:
    # In detectron2's words, and on every rank: the losses are those of the whole step.
    if not math.isfinite(losses.total):
        raise FloatingPointError(
            f"Loss became infinite or NaN at iteration={iteration}!\nloss_dict = {losses.losses}"
        )
