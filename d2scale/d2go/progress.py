"""Resuming under d2go by images seen: on another world size, or by another method.

d2go's ``do_train`` reads one number from a checkpoint, the iteration, and takes optimizer and
scheduler as they were saved. Here the checkpoint gets a record as one more checkpointable, and
what it says is put in the terms of the plan that runs now before ``do_train`` sees it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import detectron2.utils.comm as comm
import torch

from d2scale import __version__
from d2scale.d2go.scaling_methods import applied_plan
from d2scale.d2go.user_errors import exit_on_user_error
from d2scale.errors import CheckpointError, Fault
from d2scale.planning.continuation import continue_training
from d2scale.planning.progress import FORMAT, Progress, recipe_of

logger = logging.getLogger(__name__)


class ProgressRecord:
    """What a checkpoint says about the run that wrote it; d2go saves and loads it by its name.

    Args:
        cfg: the config that runs, scaled.
        recipe: ``recipe_of`` the config before d2go scaled it; None: not known, and then taken
            back from the plan.
    """

    def __init__(self, cfg: Any, recipe: Mapping[str, Any] | None = None) -> None:
        plan = applied_plan(cfg)
        self._cfg = cfg
        self._recipe = dict(recipe or recipe_of(cfg, plan.changes if plan else None))
        self._plan = plan.to_json() if plan else self._d2gos_plan()
        self._loaded: Mapping[str, Any] | None = None
        self._start_iteration = 0
        self._images_before = 0

    def _d2gos_plan(self) -> dict[str, Any]:
        """What d2go's own methods have made of the recipe, as far as a plan tells it."""
        total, world_size = self._cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
        now = recipe_of(self._cfg)
        return {
            "method": "d2go",
            "world_size": world_size,
            "ims_per_gpu": total // world_size,
            "accumulation_steps": 1,
            "ims_per_batch": total,
            "changes": {
                key: [value, now[key]]
                for key, value in self._recipe.items()
                if key in now and now[key] != value
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the record. With the iteration beside it in the file it tells the images seen."""
        return {
            "format": FORMAT,
            "version": __version__,
            "recipe": self._recipe,
            "plan": self._plan,
            "start_iteration": self._start_iteration,
            "images_before": self._images_before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the record of a checkpoint in, for :meth:`go_on`."""
        self._loaded = state

    def go_on(self, iteration: int) -> int:
        """Return the iteration of this plan that follows what the loaded checkpoint has seen.

        Args:
            iteration: the last one finished, in the steps of the run that wrote it.

        Raises:
            CheckpointError: for a newer format, or another recipe that was not asked for.
        """
        stopped = self._stopped(iteration)
        continuation = continue_training(
            stopped,
            self._recipe,
            self._plan,
            max_iter=self._cfg.SOLVER.MAX_ITER,
            allow_changes=self._cfg.D2SCALE.ALLOW_CHANGED_RECIPE,
        )
        continuation.log(logger)
        logger.info("detectron2's sampler begins its order anew")
        self._start_iteration = continuation.first_iteration
        self._images_before = stopped.images_seen
        return continuation.first_iteration

    def _stopped(self, iteration: int) -> Progress:
        found = self._loaded
        if found is None:
            return Progress.without_record(iteration, self._recipe["SOLVER.IMS_PER_BATCH"])
        if found["format"] > FORMAT:
            allowed = f"at most {FORMAT}"
            raise CheckpointError(
                [Fault("format of the checkpoint", found["format"], allowed, "update d2scale")]
            )
        steps = iteration + 1 - found["start_iteration"]
        images = found["images_before"] + steps * found["plan"]["ims_per_batch"]
        return Progress(iteration, images, found["recipe"], found["plan"])


def resume_by_images(
    checkpointer: Any,
    record: ProgressRecord,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    max_iter: int,
) -> None:
    """Make ``checkpointer.resume_or_load`` answer in the iterations of the plan that runs now.

    Args:
        checkpointer: d2go's; ``record`` is one of its checkpointables.
        record: of this run.
        optimizer: keeps the loaded state of its parameters, with the settings it has now.
        scheduler: detectron2's; stands at the new iteration afterwards, with its rates of now.
        max_iter: of the plan.
    """
    load = checkpointer.resume_or_load

    def resume_or_load(path: str, *, resume: bool = True) -> Any:
        resumes = resume and checkpointer.has_checkpoint()
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        rates = list(scheduler.base_lrs)
        content = load(path, resume=resume)
        if resumes and "iteration" in content:
            with exit_on_user_error():
                first = record.go_on(content["iteration"])
            content["iteration"] = first - 1
            scheduler.base_lrs = rates
            # No rate is defined behind the end; nothing is trained there either.
            scheduler.last_epoch = min(first, max_iter - 1)
            rates_now = scheduler.get_lr()
            for group, kept, rate in zip(optimizer.param_groups, settings, rates_now, strict=True):
                group.update({**kept, "lr": rate})
        return content

    checkpointer.resume_or_load = resume_or_load
