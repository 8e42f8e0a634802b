"""What a training does after its steps: save checkpoints and evaluate. Every rank calls a hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from d2scale.engine.checkpoint.checkpointer import RunCheckpointer
from d2scale.engine.data.loader import TrainLoader
from d2scale.engine.telemetry.metrics import StepMetrics, is_due
from d2scale.engine.telemetry.reporter import Reporter
from d2scale.errors import D2ScaleError
from d2scale.run_folder.files import FINAL_CHECKPOINT
from d2scale.step.clock import StepClock

_FINAL = FINAL_CHECKPOINT.removesuffix(".pth")


class CheckpointHook:
    """Saves ``model_0004999.pth`` after every 5000th iteration, ``model_final.pth`` at the end.

    The states of ``loader`` and ``clock`` are kept with the weights. With ``period`` 0 only the
    last is saved.
    """

    def __init__(
        self,
        checkpointer: RunCheckpointer,
        loader: TrainLoader,
        clock: StepClock,
        *,
        period: int,
        max_iter: int,
    ) -> None:
        self._checkpointer = checkpointer
        self._loader = loader
        self._clock = clock
        self._period = period
        self._max_iter = max_iter
        self._progress: dict[str, Any] = {}
        self._saved = True

    def __call__(self, step: StepMetrics) -> None:
        # Taken now: a step that fails will have moved the loader on.
        self._remember(step.iteration, step.images_seen)
        self._saved = False
        if is_due(step, self._period):
            self.save()
        if step.iterations >= self._max_iter:
            self._save(_FINAL)

    def finish(self, checkpoint: str, images_seen: int) -> None:
        """Save ``model_final.pth`` for a run that resumed from ``checkpoint`` with no step left.

        A kill came between the last periodic checkpoint and the final one, or in the latter.
        """
        if not self._progress and checkpoint != FINAL_CHECKPOINT:
            self._remember(self._clock.iteration, images_seen)
            self._save(_FINAL)

    def _remember(self, iteration: int, images_seen: int) -> None:
        self._progress = {
            "iteration": iteration,
            "images_seen": images_seen,
            "sampler": self._loader.state_dict(),
            "clock": self._clock.state_dict(),
        }

    def save(self) -> None:
        """Save the state after the last step, unless that was done."""
        if not self._saved:
            self._save(f"model_{self._progress['iteration']:07d}")

    def _save(self, name: str) -> None:
        self._check_weights()
        self._checkpointer.save(name, **self._progress)
        self._saved = True

    def _check_weights(self) -> None:
        # Weights that are not finite must not replace a good checkpoint.
        broken = [
            name
            for name, value in self._checkpointer.model.state_dict().items()
            if value.is_floating_point() and not torch.isfinite(value).all()
        ]
        if broken:
            raise D2ScaleError(
                f"{len(broken)} weights are not finite after iteration "
                f"{self._progress['iteration']} (the first is {broken[0]}), so they are not "
                "saved; lower SOLVER.BASE_LR or clip with SOLVER.CLIP_GRADIENTS, and use --resume "
                "to go on from the last checkpoint"
            )


class EvaluationHook:
    """Evaluates after every ``period`` iterations but the last: a run ends with one anyway.

    ``evaluate`` returns metrics by name on the first rank, nothing elsewhere; ``reporter`` writes
    them. With ``period`` 0 there are none.
    """

    def __init__(
        self,
        evaluate: Callable[[], Mapping[str, float]],
        reporter: Reporter,
        *,
        period: int,
        max_iter: int,
    ) -> None:
        self._evaluate = evaluate
        self._reporter = reporter
        self._period = period
        self._max_iter = max_iter

    def __call__(self, step: StepMetrics) -> None:
        if is_due(step, self._period) and step.iterations < self._max_iter:
            self.evaluate(step.iteration, step.images_seen)

    def evaluate(self, iteration: int, images_seen: int) -> dict[str, float]:
        """Evaluate, write the metrics for ``iteration`` and return them."""
        results = dict(self._evaluate())
        if results:
            self._reporter.write(iteration, {**results, "images_seen": images_seen})
        return results
