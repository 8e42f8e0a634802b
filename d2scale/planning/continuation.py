"""Resume a stopped training under the current recipe and plan, the same way in every engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from d2scale.planning.formats import table
from d2scale.planning.progress import (
    Changes,
    Progress,
    next_iteration,
    plan_changes,
    recipe_changes,
    refuse_changes,
)

# If one of them changes, the recorded position in the order of images means nothing.
_ORDER_KEYS = frozenset(
    ("SEED", "DATASETS.TRAIN", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "DATALOADER.SAMPLER_TRAIN")
)


@dataclass(frozen=True)
class Continuation:
    """Where a resumed training starts, and what has changed since it stopped."""

    first_iteration: int  # counted in steps of the current plan
    changes: Changes  # of the recipe; the user has allowed them
    warnings: tuple[str, ...]  # to log
    notes: tuple[str, ...]  # to log

    @property
    def keeps_order(self) -> bool:
        """Whether the recorded position in the order of images still applies."""
        return not _ORDER_KEYS & set(self.changes)

    def log(self, logger: logging.Logger) -> None:
        """Log what has changed and at which iteration the training resumes."""
        for text in self.warnings:
            logger.warning(text)
        for text in self.notes:
            logger.info(text)


def continue_training(
    stopped: Progress,
    recipe: Mapping[str, Any],
    plan: Mapping[str, Any],
    *,
    max_iter: int,
    allow_changes: bool,
) -> Continuation:
    """Compare a stopped training with the current recipe and plan, and find its next iteration.

    Args:
        recipe: ``recipe_of`` the config before planning.
        plan: ``Plan.to_json()``, or as much of it as is known.
        allow_changes: ``D2SCALE.ALLOW_CHANGED_RECIPE``.

    Raises:
        CheckpointError: if the recipe has changed without the user's consent.
    """
    changes = recipe_changes(stopped, recipe)
    if not allow_changes:
        refuse_changes(changes)
    first = next_iteration(
        stopped.images_seen,
        recipe_images=recipe["SOLVER.MAX_ITER"] * recipe["SOLVER.IMS_PER_BATCH"],
        ims_per_batch=plan["ims_per_batch"],
        max_iter=max_iter,
    )
    warnings = [stopped.assumption] if stopped.assumption else []
    if changes:
        warnings.append(f"the recipe has changed, as allowed:\n{_table(changes)}")
    place = (
        f"{stopped.images_seen} images seen in {stopped.iteration + 1} iterations: going on with "
        f"iteration {first} of {max_iter}"
    )
    notes = (*_plan_notes(stopped, recipe, plan), place)
    return Continuation(first, changes, tuple(warnings), notes)


def _plan_notes(
    stopped: Progress, recipe: Mapping[str, Any], plan: Mapping[str, Any]
) -> Iterator[str]:
    if not stopped.plan:
        return
    if changes := plan_changes(stopped.plan, plan):
        yield f"the plan has changed:\n{_table(changes)}"
    total = plan["ims_per_batch"]
    before = stopped.plan.get("ims_per_batch", total)
    if before != total:
        yield _batch_change_note(str(recipe.get("SOLVER.OPTIMIZER", "sgd")).lower(), before, total)


def _batch_change_note(optimizer: str, old: int, new: int) -> str:
    """Return what a change of the total batch means for an optimizer's state, which is kept."""
    effect = (
        "momentum is an average of gradients, which keep their size, and the new learning rate "
        "applies to it at once"
    )
    if optimizer.startswith("adam"):
        effect = (
            "its second moments are those of gradients over the old batch and need about "
            "1 / (1 - beta2) steps to follow"
        )
    return f"the total batch changes from {old} to {new}; the optimizer's state is kept: {effect}"


def _table(changes: Changes) -> str:
    return table(["", "until now", "from now on"], [(key, *pair) for key, pair in changes.items()])
