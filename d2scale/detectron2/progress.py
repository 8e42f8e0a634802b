"""Resuming detectron2's loop by images seen: on another world size, or by another method.

The loop reads one number from a checkpoint, the iteration, and takes optimizer and scheduler as
they were saved. Here a checkpoint also holds a record of its run, and before the loop sees what
was loaded, it is translated into the iterations of the current plan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from d2scale import __version__
from d2scale.detectron2.last_checkpoint import name_last_checkpoint, using
from d2scale.detectron2.private_upstream import files_judged, taking_steps
from d2scale.detectron2.rates import set_rates
from d2scale.detectron2.scaling import applied_plan
from d2scale.detectron2.user_errors import exit_together_on_user_error
from d2scale.errors import CheckpointError, Fault
from d2scale.planning.continuation import Continuation, continue_training
from d2scale.planning.progress import FORMAT, RECORD, Progress, recipe_of
from d2scale.planning.schedule import follows_gain, recipe_ims_per_batch
from d2scale.step import ranks
from d2scale.step.clock import build_clock
from d2scale.step.optimizer_state import adapt_state

logger = logging.getLogger(__name__)

# What writes checkpoints that hold their optimizer in different places.
_DEFAULT, _D2GO = "d2scale's default engine", "d2go"
_OF_CONFIG, _OF_LAZY_CONFIG = "detectron2 with a config", "detectron2 with a LazyConfig"


class ProgressRecord:
    """The record of a run in its checkpoints; detectron2's checkpointer saves and loads it.

    Args:
        cfg: the config that runs, scaled.
        recipe: ``recipe_of`` the config before it was scaled; None: not known, and then taken
            back from the plan.
        engine: what trains, and scales a config that has no plan of d2scale.
    """

    def __init__(
        self, cfg: Any, recipe: Mapping[str, Any] | None = None, *, engine: str = "detectron2"
    ) -> None:
        plan = applied_plan(cfg)
        self._cfg = cfg
        self._engine = engine
        self._recipe = dict(recipe or recipe_of(cfg, plan.changes if plan else None))
        self._plan = plan.to_json() if plan else self._plan_of_engine(engine)
        self._loaded: Mapping[str, Any] | None = None
        self.keeps_order = True  # whether a checkpoint's place in the data still applies
        self._start_iteration = 0
        self._images_before = 0
        self._recipe_images_before = 0.0
        # Kept by what takes the steps. Without the gain rule that may be the engine's own trainer,
        # which keeps neither.
        self.clock = build_clock(cfg)
        self.images_seen = 0

    def _plan_of_engine(self, engine: str) -> dict[str, Any]:
        """Return what the engine's own methods have changed, as far as a plan has words for it."""
        total, world_size = self._cfg.SOLVER.IMS_PER_BATCH, ranks.world_size()
        now = {**self._recipe, **recipe_of(self._cfg)}
        changes = {key: [old, now[key]] for key, old in self._recipe.items() if now[key] != old}
        by_gain: dict[str, Any] = {}
        if follows_gain(self._cfg):
            by_gain = {"lr_rule": "gain", "batch_ratio": total / recipe_ims_per_batch(self._cfg)}
        return {
            "method": engine,
            "world_size": world_size,
            "ims_per_gpu": total // world_size,
            "accumulation_steps": 1,
            "ims_per_batch": total,
            "changes": changes,
            **by_gain,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the record.

        It gives the images seen: by the gain rule as they are, and else with the iteration that
        stands beside it.
        """
        by_gain = {"images_seen": self.images_seen} if follows_gain(self._cfg) else {}
        return {
            "format": FORMAT,
            "version": __version__,
            "engine": self._engine,
            "recipe": self._recipe,
            "plan": self._plan,
            "start_iteration": self._start_iteration,
            "images_before": self._images_before,
            "recipe_images_before": self._recipe_images_before,
            **by_gain,
            "clock": self.clock.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the record of a checkpoint, for :meth:`next_iteration`."""
        self._loaded = state

    def next_iteration(self, iteration: int) -> int:
        """Return the iteration of the current plan with which the loaded training goes on.

        Args:
            iteration: the last one finished, in the steps of the run that wrote the checkpoint.

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
        self.keeps_order = continuation.keeps_order
        self._start_iteration = self._first_iteration(stopped, continuation)
        self._images_before = self.images_seen = stopped.images_seen
        self._recipe_images_before = continuation.recipe_images
        clock = (self._loaded or {}).get("clock")
        self.clock.resume(continuation.iterations, continuation.recipe_images, clock)
        return self._start_iteration

    def _first_iteration(self, stopped: Progress, continuation: Continuation) -> int:
        if self._plan.get("lr_rule") != "gain":
            return continuation.first_iteration
        begun = int(continuation.iterations)
        if stopped.plan.get("lr_rule") == "gain" and not continuation.changes:
            # The last step may have gone beyond its iteration: hooks pass through the others too.
            return min(begun, stopped.iteration + 1)
        return begun

    def _stopped(self, iteration: int) -> Progress:
        record = self._loaded
        if record is None:
            return Progress.without_record(iteration, self._recipe["SOLVER.IMS_PER_BATCH"])
        if record["format"] > FORMAT:
            allowed = f"at most {FORMAT}"
            raise CheckpointError(
                [Fault("format of the checkpoint", record["format"], allowed, "update d2scale")]
            )
        images, recipe_images = _images_of(record, iteration)
        return Progress(
            iteration, images, record["recipe"], record["plan"], recipe_images=recipe_images
        )


def _images_of(record: Mapping[str, Any], iteration: int) -> tuple[int, float]:
    """Return the images seen after ``iteration``, and those of the recipe that they were worth."""
    if record["plan"].get("lr_rule") == "gain":
        return record["images_seen"], record["clock"]["recipe_images"]
    steps = iteration + 1 - record["start_iteration"]
    images, before = steps * record["plan"]["ims_per_batch"], record["images_before"]
    # Records of older versions know of no other worth.
    return before + images, record.get("recipe_images_before", before) + images


def resume_by_images(
    checkpointer: Any,
    record: ProgressRecord,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    max_iter: int,
    trainer: Any = None,
) -> None:
    """Make ``checkpointer.resume_or_load`` answer in the iterations of the current plan.

    Args:
        checkpointer: detectron2's; ``record`` is one of its checkpointables.
        record: of this run.
        optimizer: keeps the loaded state of its parameters, with its own settings.
        scheduler: detectron2's; it is set to the new iteration, with its own rates. None: it is
            built when training begins, from the rates that the optimizer's groups have now.
        max_iter: of the plan.
        trainer: the one that has loaded its iteration, and is to go on with the plan's.
    """
    load = checkpointer.resume_or_load

    def resume_or_load(path: str, *, resume: bool = True) -> Any:
        groups = [dict(group) for group in optimizer.param_groups]
        rates = None if scheduler is None else list(scheduler.base_lrs)
        resumes = resume and _finds_checkpoint(checkpointer)
        content = _load_own(partial(load, path, resume=resume), checkpointer, judges=resumes)
        first: int | None = None
        with exit_together_on_user_error(), using("record of the checkpoint"):
            if resumes and "iteration" in content:
                first = record.next_iteration(content["iteration"])
            _refuse_other_files((first, record.clock.iterations), checkpointer.save_dir)
        if first is not None:
            content["iteration"] = first - 1
            if trainer is not None:
                trainer.iter = first - 1
            # Behind the end there is no rate, and no training either.
            _use_own_settings(optimizer, groups, scheduler, rates, min(first, max_iter - 1))
        return content

    checkpointer.resume_or_load = resume_or_load


def _finds_checkpoint(checkpointer: Any) -> bool:
    """Return whether detectron2 will find a checkpoint; it is named first. All ranks call it."""
    with exit_together_on_user_error():
        if ranks.rank() == 0 and "://" not in checkpointer.save_dir:
            name_last_checkpoint(Path(checkpointer.save_dir))
    found: bool = checkpointer.has_checkpoint()
    return found


def _load_own(load: Callable[[], Any], checkpointer: Any, *, judges: bool) -> Any:
    """Return what ``load`` does; a checkpoint that it ``judges`` must be of this engine."""
    if not judges:
        return load()
    judge = partial(_refuse_other_writers, checkpointer)
    file = f"checkpoint {checkpointer.get_checkpoint_file()}"
    with exit_together_on_user_error(), files_judged(checkpointer, judge), using(file):
        return load()


def _refuse_other_writers(checkpointer: Any, content: Mapping[str, Any]) -> None:
    """Raise a CheckpointError for a checkpoint that holds its optimizer in another place."""
    trainer = checkpointer.checkpointables.get("trainer")
    own = _D2GO
    if trainer is not None:
        own = _OF_LAZY_CONFIG if taking_steps(trainer) is trainer else _OF_CONFIG
    writer = _writer_of(content)
    if "iteration" in content and writer != own:
        advice = "resume with --engine and the kind of recipe that the run was started with"
        fault = Fault(f"writer of the checkpoint in {checkpointer.save_dir}", writer, own, advice)
        raise CheckpointError([fault])


def _writer_of(content: Mapping[str, Any]) -> str:
    # Older records do not name the engine.
    if content.get(RECORD, {}).get("engine") == "default" or "sampler" in content:
        return _DEFAULT
    if "_trainer" in (trainer := content.get("trainer", {})):
        return _OF_CONFIG
    if "optimizer" in trainer:
        return _OF_LAZY_CONFIG
    return _D2GO if "optimizer" in content else "one that keeps no optimizer"


def _use_own_settings(
    optimizer: torch.optim.Optimizer,
    groups: list[dict[str, Any]],
    scheduler: Any,
    rates: list[float] | None,
    iteration: int,
) -> None:
    """Let a loaded optimizer and scheduler go on with this run's own settings and rates."""
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update({"initial_lr": own["lr"], **own})
    if scheduler is not None:
        scheduler.base_lrs = rates
        scheduler.last_epoch = iteration
        set_rates(optimizer, scheduler.get_lr())
    adapt_state(optimizer)


def _refuse_other_files(position: tuple[int | None, float], folder: str) -> None:
    if not ranks.same_on_all_ranks(position):
        advice = "give all machines the same files, or start from MODEL.WEIGHTS without --resume"
        fault = Fault("OUTPUT_DIR", folder, "a folder shared by all ranks", advice)
        raise CheckpointError([fault])
