"""What a checkpoint records about its training, so that other hardware can resume it.

A checkpoint's iteration means nothing without the total batch of its moment. What carries over
is the images seen: with the recipe they say which iteration of any plan comes next, and at
which learning rate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d2scale.config.keys import as_json, differences, get_key
from d2scale.config.loading import flatten
from d2scale.config.own_datasets import annotation_digests
from d2scale.errors import CheckpointError, Fault
from d2scale.planning.rules import LR_RULE

# Raised when an older d2scale can no longer read what this one writes.
FORMAT = 1
# The key of the record in a checkpoint.
RECORD = "d2scale"

_SECTIONS = ("SOLVER", "DATASETS", "DATALOADER", "INPUT", "MODEL", "D2GO_DATA.AUG_OPS")
# How a training runs, saves and evaluates, not what it computes.
_NOT_RECIPE = re.compile(
    r"SOLVER\.(AUTO_SCALING_METHODS|CHECKPOINT_PERIOD|DETERMINISTIC|FUSED|REFERENCE_WORLD_SIZE)"
    r"|SOLVER\.AMP\.(ENABLED|LOG_GRAD_SCALER|PRECISION)"
    r"|DATALOADER\.(NUM_WORKERS|PREFETCH_FACTOR)"
    r"|MODEL\.(DDP_FIND_UNUSED_PARAMETERS|DDP_FP16_GRAD_COMPRESS|DDP_GRADIENT_AS_BUCKET_VIEW)"
    r"|MODEL\.(DEVICE|WEIGHTS)"
    r"|(.*[._])?TEST(\..*)?"
)
_PLAN_FACTS = {
    "method": "method",
    "world_size": "GPUs",
    "ims_per_gpu": "images per GPU",
    "accumulation_steps": "accumulation steps",
    "ims_per_batch": "total batch",
    "lr_rule": "learning-rate rule",
    "virtual_ranks": "virtual ranks",
    "sync_bn": "synchronised batch norm",
}

Changes = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Progress:
    """A stopped training, as its checkpoint records it; recipe and plan may be empty."""

    iteration: int  # the last one finished, counted in the steps of the plan of that time
    images_seen: int  # images shown in all finished steps
    recipe: Mapping[str, Any]  # what must not change, from recipe_of
    plan: Mapping[str, Any]  # Plan.to_json() of the run that stopped
    seed: int | None = None  # of order and augmentation; None if not known
    sampler: dict[str, Any] | None = None  # position in the order of images; None if not known
    # Images of the recipe's training that the steps were worth; by the gain rule not those that
    # were shown. None: those that were shown.
    recipe_images: float | None = None
    assumption: str = ""  # what was taken for granted, if the checkpoint has no record

    @classmethod
    def without_record(cls, iteration: int, ims_per_batch: int) -> Progress:
        """Assume that a checkpoint of plain detectron2 or d2go is of this very recipe."""
        images = (iteration + 1) * ims_per_batch
        assumption = (
            "the checkpoint has no record of d2scale: assuming this recipe, run at its own total "
            f"batch, so {iteration + 1} iterations of {ims_per_batch} images: {images} images seen"
        )
        return cls(iteration, images, recipe={}, plan={}, assumption=assumption)


def recipe_of(cfg: Any, planned: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the keys and values of a recipe that must stay the same when it is resumed.

    Left out is what a machine decides (device, precision, workers), what only saves and
    evaluates, and what starts a training (MODEL.WEIGHTS). ``planned`` are the ``changes`` of a
    plan that ``cfg`` has already had: they are taken back. The config's own datasets are told by
    what their annotation files hold.
    """
    recipe = {"SEED": get_key(cfg, "SEED", -1)}
    for section in _SECTIONS:
        node = get_key(cfg, section)
        values = flatten(node, f"{section}.") if isinstance(node, Mapping) else [(section, node)]
        recipe.update({key: value for key, value in values if value is not None})
    if get_key(cfg, "MODEL_EMA.ENABLED", False):
        recipe["MODEL_EMA.DECAY"] = cfg.MODEL_EMA.DECAY
    if get_key(cfg, "QUANTIZATION.QAT.ENABLED", False):
        recipe.update(flatten(cfg.QUANTIZATION.QAT, "QUANTIZATION.QAT."))
    recipe.update(annotation_digests(cfg))
    recipe.update({key: old for key, (old, _) in (planned or {}).items() if key in recipe})
    return {key: as_json(recipe[key]) for key in sorted(recipe) if not _NOT_RECIPE.fullmatch(key)}


def recipe_changes(progress: Progress, recipe: Mapping[str, Any]) -> Changes:
    """Return the keys in which ``recipe`` differs from that of the stopped training.

    The config that a run leaves in its folder is planned already; it counts as the same recipe.
    A key that only one of the two has is one that another version has added.
    """
    written = progress.recipe
    changes = progress.plan.get("changes", {})
    planned = {key: as_json(new) for key, (_, new) in changes.items() if key in written}
    before = (written, {**written, **planned})
    return min((differences(old, recipe) for old in before), key=len)


def refuse_changes(changes: Changes) -> None:
    """Raise a CheckpointError with a line for each change of the recipe, if there is one."""
    accept = "or accept the new one with --allow-changed-recipe (D2SCALE.ALLOW_CHANGED_RECIPE True)"
    if faults := [
        Fault(key, new, f"{old!r}, as in the training to resume", f"{_advice(key, old)}, {accept}")
        for key, (old, new) in changes.items()
    ]:
        raise CheckpointError(faults)


def _advice(key: str, old: Any) -> str:
    # auto may have chosen it: the user never set this key.
    return f"add {key} {old}" if key == LR_RULE else "resume with the recipe it was started with"


def next_iteration(
    images_seen: int, *, recipe_images: int, ims_per_batch: int, max_iter: int
) -> int:
    """Return the iteration of a plan at which a training resumes.

    Counted from the end: the steps left are the fewest that show the rest of the recipe's
    images. So the training shows at least the recipe's images and less than one step more,
    and the schedule stands within one step of the images seen: at ``images_seen /
    ims_per_batch``, where that is a whole number.

    ``recipe_images`` is MAX_ITER times B0; ``ims_per_batch`` and ``max_iter`` are the plan's.

    >>> next_iteration(48, recipe_images=160, ims_per_batch=16, max_iter=10)
    3
    >>> next_iteration(56, recipe_images=160, ims_per_batch=16, max_iter=10)
    3
    """
    left = -(-max(0, recipe_images - images_seen) // ims_per_batch)
    return max(0, max_iter - left)


def plan_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """Return the facts and keys in which two plans of one recipe differ, ``Plan.to_json()`` both.

    Keys are the words of the plan's table, then config keys.
    """
    facts = (
        {name: plan[key] for key, name in _PLAN_FACTS.items() if key in plan} for plan in (old, new)
    )
    before, after = old.get("changes", {}), new.get("changes", {})
    recipe = {key: value for key, (value, _) in sorted({**after, **before}.items())}
    keys = (
        {key: as_json(plan[key][1] if key in plan else recipe[key]) for key in recipe}
        for plan in (before, after)
    )
    return {**differences(*facts), **differences(*keys)}
