"""Resume a stopped training under the current recipe and plan, the same way in every engine."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from d2scale.config.keys import differences
from d2scale.planning.formats import table
from d2scale.planning.gain import recipe_steps
from d2scale.planning.progress import (
    Changes,
    Progress,
    next_iteration,
    plan_changes,
    recipe_changes,
    refuse_changes,
)
from d2scale.planning.rules import LR_RULE

# If one of them changes, the recorded position in the order of images means nothing.
_ORDER_KEYS = frozenset(
    ("SEED", "DATASETS.TRAIN", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "DATALOADER.SAMPLER_TRAIN")
)


@dataclass(frozen=True)
class Continuation:
    """Where a resumed training starts, and what has changed since it stopped."""

    iterations: float  # of the current plan's schedule that are done; a whole number but for gain
    recipe_images: float  # of the recipe's training that the steps so far were worth
    changes: Changes  # of the recipe; the user has allowed them
    warnings: tuple[str, ...]  # to log
    notes: tuple[str, ...]  # to log

    @property
    def first_iteration(self) -> int:
        """The iteration of the current plan's schedule that comes next."""
        return math.ceil(self.iterations)

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
    changes |= _rule_change(stopped.plan, plan)
    if not allow_changes:
        refuse_changes(changes)
    images = stopped.images_seen if stopped.recipe_images is None else stopped.recipe_images
    iterations = _iterations(images, recipe, plan, max_iter)
    warnings = [stopped.assumption] if stopped.assumption else []
    if changes:
        warnings.append(f"the recipe has changed, as allowed:\n{_table(changes)}")
    place = (
        f"{stopped.images_seen} images seen in {stopped.iteration + 1} iterations: going on with "
        f"iteration {math.ceil(iterations)} of {max_iter}"
    )
    notes = (*_plan_notes(stopped, recipe, plan), place)
    return Continuation(iterations, images, changes, tuple(warnings), notes)


def _iterations(
    images: float, recipe: Mapping[str, Any], plan: Mapping[str, Any], max_iter: int
) -> float:
    """Return the iterations of a plan's schedule that ``images`` of the recipe are worth."""
    # Images for which an iteration of the recipe counts.
    count = _recipe_ims_per_batch(plan) or recipe["SOLVER.IMS_PER_BATCH"]
    if plan.get("lr_rule") == "gain":
        return min(recipe_steps(images, count), float(max_iter))
    return next_iteration(
        round(images),
        recipe_images=recipe["SOLVER.MAX_ITER"] * count,
        ims_per_batch=plan["ims_per_batch"],
        max_iter=max_iter,
    )


def _recipe_ims_per_batch(plan: Mapping[str, Any]) -> float | None:
    """Return the images of a recipe's step by a plan of it, None if that does not say."""
    ratio = plan.get("batch_ratio")
    return round(plan["ims_per_batch"] / ratio) if ratio else None


def _rule_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """Return the learning-rate rule if another one took effect until now."""
    # At the recipe's own batch all rules are one, and auto is another above it than below.
    sides = {plan.get("batch_ratio", 1.0) > 1.0 for plan in (old, new)}
    rescaled = all(plan.get("batch_ratio", 1.0) != 1.0 for plan in (old, new))
    if not rescaled or len(sides) > 1 or not {"lr_rule"} <= {*old} & {*new}:
        return {}
    return differences({LR_RULE: old["lr_rule"]}, {LR_RULE: new["lr_rule"]})


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
