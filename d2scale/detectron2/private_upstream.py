"""Private parts of detectron2 and torch that the engine uses, in one place.

``tests/detectron2/test_private_upstream.py`` names the versions that they were tried with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, TrainerBase, defaults, hooks
from detectron2.engine.hooks import IterationTimer
from detectron2.utils import comm
from fvcore.common.timer import Timer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from d2scale.detectron2.last_checkpoint import reading

try:
    from torch.distributed.fsdp import FSDPModule
except ImportError:  # before torch 2.6
    from torch.distributed._composable.fsdp import FSDPModule

# Models whose parameters, and so whose gradients, are not whole on any rank.
FULLY_SHARDED: tuple[type, ...] = (FullyShardedDataParallel, FSDPModule)


def taking_steps(trainer: TrainerBase) -> TrainerBase:
    """Return the trainer that takes the steps of ``trainer``: itself, or a DefaultTrainer's own."""
    return trainer._trainer if isinstance(trainer, DefaultTrainer) else trainer


@contextmanager
def without_wrapper() -> Iterator[None]:
    """Within the context, a DefaultTrainer does not wrap its model in DistributedDataParallel.

    d2scale averages gradients itself, and on a CPU detectron2's wrapping fails.
    """
    wrap = defaults.create_ddp_model
    defaults.create_ddp_model = lambda model, **options: model
    try:
        yield
    finally:
        defaults.create_ddp_model = wrap


def insert_hooks(trainer: TrainerBase, ours: Sequence[HookBase]) -> None:
    """Register hooks before those that save, evaluate or write."""
    savers = (hooks.PeriodicCheckpointer, hooks.BestCheckpointer)
    kinds = (*savers, hooks.EvalHook, hooks.PeriodicWriter)
    before = [*trainer._hooks]
    place = next((i for i, hook in enumerate(before) if isinstance(hook, kinds)), len(before))
    trainer.register_hooks([*ours])
    trainer._hooks[:] = [*before[:place], *ours, *before[place:]]


def replace_hook(trainer: TrainerBase, kind: type[HookBase], ours: HookBase) -> None:
    """Register ``ours`` in the place of the hooks of exactly this kind."""
    before = [*trainer._hooks]
    trainer.register_hooks([ours])
    trainer._hooks[:] = [ours if type(hook) is kind else hook for hook in before]


def checkpoint_periods(trainer: TrainerBase) -> set[int]:
    """Return the periods in which the hooks of ``trainer`` save checkpoints."""
    return {hook.period for hook in trainer._hooks if isinstance(hook, hooks.PeriodicCheckpointer)}


def evaluation_periods(trainer: TrainerBase) -> set[int]:
    """Return the periods in which the hooks of ``trainer`` evaluate, 0 for only at the end."""
    return {hook._period for hook in trainer._hooks if isinstance(hook, hooks.EvalHook)}


class WholeCheckpointer(DetectionCheckpointer):
    """detectron2's, for models that are not trained: every parameter must be in the file.

    detectron2 names those that are not in the log, and leaves them random.
    """

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        super()._log_incompatible_keys(incompatible)
        lacking = {*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)}
        names = [name for name, _ in self.model.named_parameters() if name in lacking]
        if names:
            raise LookupError(f"it lacks {len(names)} parameters of the model, such as {names[0]}")


@contextmanager
def files_judged(checkpointer: Any, judge: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Within the context, ``judge`` is called with what a checkpoint holds before it is loaded.

    One that cannot be read is a CheckpointError.
    """
    read = checkpointer._load_file

    def read_and_judge(path: str) -> dict[str, Any]:
        with reading(path):
            content: dict[str, Any] = read(path)
        judge(content)
        return content

    checkpointer._load_file = read_and_judge
    try:
        yield
    finally:
        del checkpointer._load_file


def join_local_group(processes: int | None = None) -> None:
    """Let detectron2 know the ranks of this machine, which only its own launcher tells it.

    ``processes`` are those of each machine; None: as torchrun says, or all.
    """
    if comm.get_world_size() > 1 and comm._LOCAL_PROCESS_GROUP is None:
        local = processes or int(os.environ.get("LOCAL_WORLD_SIZE", comm.get_world_size()))
        comm.create_local_process_group(local)


def next_batch(trainer: SimpleTrainer) -> list[Any]:
    """Return this rank's samples of the next step."""
    return next(trainer._data_loader_iter)


def hooks_after_backward(trainer: SimpleTrainer) -> list[HookBase]:
    """Return the trainer's hooks that do something between backward and update."""
    return [
        hook for hook in trainer._hooks if type(hook).after_backward is not HookBase.after_backward
    ]


class SteadyIterationTimer(IterationTimer):
    """detectron2's timer, for a trainer that takes no step in some iterations.

    The time left is estimated from the median of the iterations' times. ``seconds`` returns what
    an iteration takes on average, None where that is not known yet.
    """

    def __init__(self, seconds: Callable[[], float | None]) -> None:
        super().__init__()
        self._step_timer = _Average(seconds)


class _Average(Timer):
    def __init__(self, average: Callable[[], float | None]) -> None:
        super().__init__()
        self._average = average

    def seconds(self) -> float:
        average = self._average()
        return float(super().seconds()) if average is None else average


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model inside of a DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def without_gradient_buckets(model: nn.Module) -> nn.Module:
    """Return the bare model of a DistributedDataParallel and free the buckets of the latter.

    They are a second copy of all gradients, which ``OptimizerStep`` has no use for. The wrapper
    can evaluate afterwards, but not train. Other models are returned as they are.
    """
    if not isinstance(model, DistributedDataParallel):
        return model
    model.reducer = None  # type: ignore[assignment]
    model.logger = None
    return model.module
