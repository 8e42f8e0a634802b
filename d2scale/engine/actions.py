"""What a run does after a step: save, evaluate, report. Each is called on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from fvcore.common.checkpoint import PeriodicCheckpointer

from d2scale.engine.checkpoint.checkpointer import RunCheckpointer
from d2scale.engine.telemetry.writers import Reporter, StepMetrics
from d2scale.errors import D2ScaleError
from d2scale.step.ranks import largest_over_ranks


class HasState(Protocol):
    """Anything with a place to go on from."""

    def state_dict(self) -> dict[str, Any]: ...


class Save:
    """Writes ``model_0004999.pth`` after every 5000th step, and ``model_final.pth``.

    Args:
        checkpointer: what it writes with.
        sampler: its state is kept with the weights.
        period: steps between checkpoints; 0: only the last.
        max_iter: steps of the whole training.
    """

    def __init__(
        self, checkpointer: RunCheckpointer, sampler: HasState, *, period: int, max_iter: int
    ) -> None:
        self._model = checkpointer.model
        self._sampler = sampler
        self._period = period or max_iter
        self._max_iter = max_iter
        self._checkpointer = checkpointer
        self._periodic = PeriodicCheckpointer(checkpointer, period or max_iter + 1, max_iter)
        self._unsaved: dict[str, Any] | None = None

    def __call__(self, step: StepMetrics) -> None:
        done = step.iteration + 1
        place = {"images_seen": step.images_seen, "sampler": self._sampler.state_dict()}
        if done % self._period and done != self._max_iter:
            # A step that fails will have moved the sampler on.
            self._unsaved = {"iteration": step.iteration, **place}
            return
        self._unsaved = None
        self._check_weights(step.iteration)
        self._periodic.step(step.iteration, **place)

    def last_step(self) -> None:
        """Save the state after the last step, out of turn, unless it is saved already."""
        if self._unsaved is not None:
            iteration = self._unsaved["iteration"]
            self._check_weights(iteration)
            self._checkpointer.save(f"model_{iteration:07d}", **self._unsaved)
            self._unsaved = None

    def _check_weights(self, iteration: int) -> None:
        """Weights that are not finite must not replace a good checkpoint."""
        broken = [
            name
            for name, value in self._model.state_dict().items()
            if value.is_floating_point() and not torch.isfinite(value).all()
        ]
        if broken:
            raise D2ScaleError(
                f"{len(broken)} weights are not finite after iteration {iteration} (the first is "
                f"{broken[0]}), so they are not saved; lower SOLVER.BASE_LR or clip with "
                "SOLVER.CLIP_GRADIENTS, and use --resume to go on from the last checkpoint"
            )


class Evaluate:
    """Evaluates after every ``period`` steps; the end of the run has an evaluation of its own.

    Args:
        evaluate: returns metrics by name on the first rank, nothing elsewhere.
        reporter: is told the metrics.
        period: steps between evaluations; 0: none.
        max_iter: steps of the whole training.
        images_before: images that earlier runs have shown.
    """

    def __init__(
        self,
        evaluate: Callable[[], Mapping[str, float]],
        reporter: Reporter,
        *,
        period: int,
        max_iter: int,
        images_before: int = 0,
    ) -> None:
        self._images_seen = images_before
        self._evaluate = evaluate
        self._reporter = reporter
        self._period = period
        self._max_iter = max_iter

    def __call__(self, step: StepMetrics) -> None:
        done = step.iteration + 1
        self._images_seen = step.images_seen
        if self._period and done % self._period == 0 and done != self._max_iter:
            self.now(step.iteration)

    def now(self, iteration: int) -> dict[str, float]:
        """Evaluate, report it for ``iteration`` and return the metrics."""
        results = dict(self._evaluate())
        if results:
            self._reporter.tell(iteration, {**results, "images_seen": self._images_seen})
        return results


class Report:
    """Hands each step to the reporter, and has it report every ``period`` steps and at the end.

    Times and memory are those of the slowest and the fullest rank.

    Args:
        reporter: one on each rank.
        device: of this rank.
        period: steps between reports.
        max_iter: steps of the whole training.
    """

    def __init__(
        self, reporter: Reporter, device: torch.device, *, period: int, max_iter: int
    ) -> None:
        self._reporter = reporter
        self._device = device
        self._period = period
        self._max_iter = max_iter

    def __call__(self, step: StepMetrics) -> None:
        self._reporter.put(step)
        done = step.iteration + 1
        if done % self._period and done != self._max_iter:
            return
        values = self._reporter.history.times()
        if self._device.type == "cuda":
            values["max_mem_mb"] = torch.cuda.max_memory_allocated(self._device) / 2**20
            values["max_reserved_mb"] = torch.cuda.max_memory_reserved(self._device) / 2**20
        self._reporter.report(step.iteration, largest_over_ranks(values))
