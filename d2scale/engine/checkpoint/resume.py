"""Resume a training from its last checkpoint, on whatever hardware."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from d2scale import __version__
from d2scale.engine.checkpoint.checkpointer import RunCheckpointer
from d2scale.engine.checkpoint.files import reading
from d2scale.errors import CheckpointError, Fault
from d2scale.planning.continuation import Continuation, continue_training
from d2scale.planning.plan import Plan
from d2scale.planning.progress import RECORD, Progress
from d2scale.run_folder.contents import write_plan
from d2scale.step.clock import StepClock
from d2scale.step.ranks import rank, same_on_all_ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where a training begins or goes on."""

    iterations: float  # of the schedule that are done
    images_seen: int  # in all finished steps
    recipe_images: float  # of the recipe's training that they were worth
    seed: int  # of order and augmentation
    clock: dict[str, Any] | None = None  # its state
    sampler: dict[str, Any] | None = None  # its state; None: the order begins
    same_steps: bool = True  # the iterations so far were steps of this plan
    checkpoint: str = ""  # the name of the file that it was read from

    @property
    def next_iteration(self) -> int:
        """The iteration of the schedule that comes next, from 0."""
        return math.ceil(self.iterations)


def resume_training(
    checkpointer: RunCheckpointer, cfg: CfgNode, plan: Plan, recipe: Mapping[str, Any], seed: int
) -> Position | None:
    """Load the last checkpoint; None if there is none.

    ``cfg`` is the planned config, ``recipe`` is ``recipe_of`` the one before planning; ``seed`` is
    for the order of images, if the checkpoint has none. Raises CheckpointError if it is not one
    of this training, or not all ranks see the same one.
    """
    last = checkpointer.read_last()
    stopped = None if last is None else _progress_in(*last, recipe)
    if not same_on_all_ranks(stopped and stopped.images_seen):
        allowed = "a folder shared by all ranks"
        advice = "give all machines the same files, or start from MODEL.WEIGHTS without --resume"
        raise CheckpointError([Fault("OUTPUT_DIR", cfg.OUTPUT_DIR, allowed, advice)])
    if last is None or stopped is None:
        logger.info("no checkpoint to resume from in %s: starting anew", cfg.OUTPUT_DIR)
        return None
    with reading(last[0], "record"):
        continuation = continue_training(
            stopped,
            recipe,
            plan.to_json(),
            max_iter=cfg.SOLVER.MAX_ITER,
            allow_changes=cfg.D2SCALE.ALLOW_CHANGED_RECIPE,
        )
    checkpointer.load(*last)
    continuation.log(logger)
    position = _position(stopped, continuation, last[1].get("clock"), seed)
    return replace(position, checkpoint=last[0].name)


def _position(
    stopped: Progress, continuation: Continuation, clock: dict[str, Any] | None, seed: int
) -> Position:
    position = Position(
        iterations=continuation.iterations,
        images_seen=stopped.images_seen,
        recipe_images=continuation.recipe_images,
        seed=seed,
        clock=clock,
        same_steps=continuation.first_iteration == stopped.iteration + 1,
    )
    if stopped.seed is None or stopped.sampler is None or not continuation.keeps_order:
        logger.info("the order of images begins anew")
        return position
    return replace(position, seed=stopped.seed, sampler=stopped.sampler)


def _progress_in(path: Path, content: Mapping[str, Any], recipe: Mapping[str, Any]) -> Progress:
    iteration: int = content["iteration"]
    record = content.get(RECORD)
    if record is None:
        return Progress.without_record(iteration, recipe["SOLVER.IMS_PER_BATCH"])
    with reading(path, "progress"):
        # Checkpoints of older versions have no clock.
        clock = content.get("clock")
        if clock is not None:
            StepClock().resume(0, clock["recipe_images"] + 0.0, clock)
        seed = record.get("seed")
        return Progress(
            iteration=iteration,
            images_seen=content["images_seen"],
            recipe=dict(record.get("recipe", {})),
            plan=dict(record.get("plan", {})),
            seed=None if seed is None else int(seed),
            sampler=content["sampler"],
            recipe_images=None if clock is None else clock["recipe_images"],
        )


class RunRecord:
    """Keeps in every checkpoint how its run was planned, and in the folder what became of it.

    ``recipe`` is ``recipe_of`` the config before planning; ``seed`` is that of order and
    augmentation.
    """

    def __init__(
        self, checkpointer: RunCheckpointer, plan: Plan, recipe: Mapping[str, Any], seed: int
    ) -> None:
        self._checkpointer = checkpointer
        self.plan = plan  # with the images per GPU of now
        checkpointer.facts = {
            "version": __version__,
            "engine": "default",
            "seed": seed,
            "plan": plan.to_json(),
            "recipe": dict(recipe),
        }

    def record_size(self, ims_per_gpu: int) -> None:
        """Write the plan with other images per GPU into the folder.

        A checkpoint has them in its ``micro_batches``, and a run that resumes has them too: its
        plan has not changed.
        """
        self.plan = self.plan.with_micro_batches_of(ims_per_gpu)
        if rank() == 0:
            write_plan(self._checkpointer.folder, self.plan)
