"""How a run of the default engine goes on from a checkpoint, on whatever hardware."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fvcore.common.config import CfgNode

from d2scale import __version__
from d2scale.engine.checkpoint.checkpointer import RunCheckpointer
from d2scale.errors import CheckpointError, Fault
from d2scale.planning.continuation import Continuation, continue_training
from d2scale.planning.plan import Plan
from d2scale.planning.progress import FORMAT, RECORD, Progress
from d2scale.step.ranks import same_on_all_ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where a training stands: the facts that a checkpoint adds to weights and optimizer.

    Attributes:
        next_iteration: in the steps of the plan that runs now.
        images_seen: in all finished steps.
        seed: of order and augmentation.
        sampler: its state; None: the order begins.
        same_steps: whether the iterations before ``next_iteration`` were steps of this plan.
    """

    next_iteration: int
    images_seen: int
    seed: int
    sampler: dict[str, Any] | None
    same_steps: bool = True


def record(plan: Plan, recipe: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return what every checkpoint says about its run, ``recipe`` being ``recipe_of(cfg)``."""
    return {
        "format": FORMAT,
        "version": __version__,
        "seed": seed,
        "plan": plan.to_json(),
        "recipe": dict(recipe),
    }


class Resumer:
    """Takes a training up where its last checkpoint stands.

    Args:
        cfg: the config that runs, planned.
        plan: of this run.
        recipe: ``recipe_of`` the config before planning.
        seed: for the order of images, if the checkpoint tells none.
    """

    def __init__(
        self,
        cfg: CfgNode,
        plan: Plan,
        recipe: Mapping[str, Any],
        seed: int,
    ) -> None:
        self._cfg = cfg
        self._plan = plan
        self._recipe = recipe
        self._seed = seed

    def resume(self, checkpointer: RunCheckpointer) -> Position | None:
        """Load the last checkpoint; None if there is none.

        Raises:
            CheckpointError: if it is not one of this training, or not all ranks see the same one.
        """
        content = checkpointer.resume(self._check)
        stopped = None if content is None else self._progress(content)
        if not same_on_all_ranks(-1 if stopped is None else stopped.images_seen):
            advice = (
                "give all machines the same files, or start from MODEL.WEIGHTS without --resume"
            )
            folder = checkpointer.save_dir
            fault = Fault("OUTPUT_DIR", folder, "a folder shared by all ranks", advice)
            raise CheckpointError([fault])
        if stopped is None:
            logger.info("no checkpoint to resume from in %s: starting anew", checkpointer.save_dir)
            return None
        return self._continue(stopped)

    def _progress(self, content: Mapping[str, Any]) -> Progress:
        iteration = int(content["iteration"])
        if RECORD not in content:
            return Progress.without_record(iteration, self._recipe["SOLVER.IMS_PER_BATCH"])
        found = content[RECORD]
        return Progress(
            iteration=iteration,
            images_seen=int(content["images_seen"]),
            recipe=found.get("recipe", {}),
            plan=found.get("plan", {}),
            seed=found.get("seed"),
            sampler=content["sampler"],
        )

    def _check(self, content: Mapping[str, Any]) -> list[Fault]:
        try:
            self._continuation(self._progress(content))
        except CheckpointError as error:
            return list(error.faults)
        return []

    def _continuation(self, stopped: Progress) -> Continuation:
        return continue_training(
            stopped,
            self._recipe,
            self._plan.to_json(),
            max_iter=self._cfg.SOLVER.MAX_ITER,
            allow_changes=self._cfg.D2SCALE.ALLOW_CHANGED_RECIPE,
        )

    def _continue(self, stopped: Progress) -> Position:
        continuation = self._continuation(stopped)
        continuation.log(logger)
        first = continuation.first_iteration
        seed, sampler = stopped.seed, stopped.sampler
        if seed is None or sampler is None or not continuation.keeps_order:
            logger.info("the order of images begins anew")
            seed, sampler = self._seed, None
        same_steps = first == stopped.iteration + 1
        return Position(first, stopped.images_seen, seed, sampler, same_steps)
