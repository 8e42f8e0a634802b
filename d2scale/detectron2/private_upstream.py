"""Private parts of detectron2 and torch that the engine uses, in one place.

``tests/detectron2/test_private_upstream.py`` names the versions that they were tried with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.hooks import IterationTimer
from fvcore.common.timer import Timer
from torch import nn
from torch.nn.parallel import DistributedDataParallel


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
