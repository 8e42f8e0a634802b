"""End a training whose loss is not finite, or whose gradients overflow in step after step."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from torch.amp.grad_scaler import GradScaler

from d2scale.errors import D2ScaleError
from d2scale.run_folder.contents import write_json
from d2scale.step.micro_batches import MicroBatch
from d2scale.step.ranks import gather_objects, rank

logger = logging.getLogger(__name__)

# The scale halves with every skipped step: from 2**16 it is down to 1 after 16.
MOST_SKIPPED_STEPS = 20


class NotFiniteLossError(D2ScaleError):
    """The loss of a step is not finite; the weights are those before that step."""

    def __init__(self, iteration: int, lr: float, losses: Mapping[str, float]) -> None:
        values = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        super().__init__(
            f"the loss is not finite at iteration {iteration} (learning rate {lr:g}): {values}; "
            "lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS or clip with "
            "SOLVER.CLIP_GRADIENTS, and use --resume to go on from the last checkpoint"
        )
        self.iteration = iteration
        self.lr = lr
        self.losses = dict(losses)

    def __reduce__(self) -> tuple[type[NotFiniteLossError], tuple[int, float, dict[str, float]]]:
        return (type(self), (self.iteration, self.lr, self.losses))


def check_finite(losses: Mapping[str, float], iteration: int, lr: float) -> None:
    """Raise NotFiniteLossError on every rank if a loss (of the whole step) is not finite."""
    if not all(math.isfinite(value) for value in losses.values()):
        raise NotFiniteLossError(iteration, lr, losses)


def write_not_finite_step(error: NotFiniteLossError, rank_batch: MicroBatch, folder: Path) -> None:
    """Write ``not_finite_0000123.json``: iteration, rate, losses and the images of all ranks.

    Every rank calls it with its images of the step.
    """
    images = [
        {"image_id": sample.get("image_id"), "file_name": sample.get("file_name"), "rank": rank()}
        for sample in rank_batch
    ]
    images_of_ranks = gather_objects(images)
    if rank() != 0:
        return
    content = {
        "iteration": error.iteration,
        "lr": error.lr,
        # JSON has no word for what is not a number.
        "losses": {k: v if math.isfinite(v) else str(v) for k, v in error.losses.items()},
        "images": list(chain.from_iterable(images_of_ranks)),
    }
    path = folder / f"not_finite_{error.iteration:07d}.json"
    write_json(path, content)
    logger.error("the images of the step are listed in %s", path)


class SkippedSteps:
    """Counts the steps that a gradient scaler skips because a gradient overflowed.

    Now and then that is normal: the scaler looks for the largest scale that works.
    """

    def __init__(self, scaler: GradScaler) -> None:
        self._scaler = scaler
        self._scale: float | None = None
        self._number = -1  # of the step that was checked last
        self._streak = 0
        self.total = 0  # steps skipped so far

    def check(self, iteration: int, number: int) -> None:
        """Check whether the step before ``iteration`` was skipped: then the scale has fallen.

        To be called when the losses of a step are known, for then the device has nothing to do;
        other attempts at the step, which has the ``number``, are not counted. Raises D2ScaleError
        after too many in a row. All ranks have the same scale, so all raise.
        """
        if number == self._number:
            return
        self._number = number
        scale = self._scaler.get_scale()
        skipped = self._scale is not None and scale < self._scale
        self._scale = scale
        self._streak = self._streak + 1 if skipped else 0
        self.total += skipped
        if skipped:
            logger.info(
                "iteration %d left the weights alone, for a gradient overflowed: the scale is "
                "now %g, steps skipped so far: %d",
                *(iteration - 1, scale, self.total),
            )
        if self._streak >= MOST_SKIPPED_STEPS:
            raise D2ScaleError(
                f"gradients overflowed in {self._streak} steps in a row, up to iteration "
                f"{iteration - 1}, although the scale fell to {scale:g}; lower SOLVER.BASE_LR, "
                "set SOLVER.AMP.PRECISION to bfloat16 or SOLVER.AMP.ENABLED to False, and use "
                "--resume to go on from the last checkpoint"
            )
