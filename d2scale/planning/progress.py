"""What a checkpoint records about its training, so that other hardware can resume it.

A checkpoint's iteration means nothing without the total batch of its moment. What carries over
is the images seen: with the recipe they say which iteration of any plan comes next, and at
which learning rate. Plain values only; every engine uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d2scale.config.keys import get_key
from d2scale.config.loading import flatten
from d2scale.errors import CheckpointError, Fault

# Raised when an older d2scale can no longer read what this one writes.
FORMAT = 1
# The key of the record in a checkpoint.
RECORD = "d2scale"

_SECTIONS = ("SOLVER", "DATASETS", "DATALOADER", "INPUT", "MODEL", "D2GO_DATA.AUG_OPS")
# How a training runs, saves and evaluates, not what it computes.
_NOT_RECIPE = frozenset(
    (
        "SOLVER.AUTO_SCALING_METHODS",
        "SOLVER.CHECKPOINT_PERIOD",
        "SOLVER.DETERMINISTIC",
        "SOLVER.FUSED",
        "SOLVER.REFERENCE_WORLD_SIZE",
        "SOLVER.AMP.ENABLED",
        "SOLVER.AMP.LOG_GRAD_SCALER",
        "SOLVER.AMP.PRECISION",
        "DATALOADER.NUM_WORKERS",
        "DATALOADER.PREFETCH_FACTOR",
        "MODEL.DDP_FIND_UNUSED_PARAMETERS",
        "MODEL.DDP_FP16_GRAD_COMPRESS",
        "MODEL.DDP_GRADIENT_AS_BUCKET_VIEW",
        "MODEL.DEVICE",
        "MODEL.WEIGHTS",
    )
)
_PLAN_FACTS = {
    "method": "method",
    "world_size": "GPUs",
    "ims_per_gpu": "images per GPU",
    "accumulation_steps": "accumulation steps",
    "ims_per_batch": "total batch",
    "lr_rule": "learning-rate rule",
}

Changes = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Progress:
    """A stopped training, as its checkpoint records it.

    Attributes:
        iteration: the last one finished, counted in the steps of the plan of that time.
        images_seen: images shown in all finished steps.
        recipe: what must not change, from :func:`recipe_of`; empty if the checkpoint is silent.
        plan: ``Plan.to_json()`` of the run that stopped; empty if the checkpoint is silent.
        seed: of order and augmentation; None if not known.
        sampler: position in the order of images; None if not known.
        assumption: what was taken for granted, if the checkpoint has no record; one sentence.
    """

    iteration: int
    images_seen: int
    recipe: Mapping[str, Any]
    plan: Mapping[str, Any]
    seed: int | None = None
    sampler: dict[str, Any] | None = None
    assumption: str = ""

    @classmethod
    def without_record(cls, iteration: int, ims_per_batch: int) -> Progress:
        """Assume that a checkpoint of plain detectron2 or d2go is of this very recipe.

        Args:
            iteration: the last one finished.
            ims_per_batch: the recipe's own total batch.
        """
        images = (iteration + 1) * ims_per_batch
        return cls(
            iteration,
            images,
            recipe={},
            plan={},
            assumption=(
                "the checkpoint has no record of d2scale: assuming this recipe, run at its own "
                f"total batch, so {iteration + 1} iterations of {ims_per_batch} images: "
                f"{images} images seen"
            ),
        )


def recipe_of(cfg: Any, planned: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the keys and values of a recipe that must stay the same when it is resumed.

    Left out is what a machine decides (device, precision, workers), what only saves and
    evaluates, and what starts a training (MODEL.WEIGHTS).

    Args:
        cfg: any engine's config.
        planned: the ``changes`` of a plan that ``cfg`` has already had: they are taken back.
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
    recipe.update({key: old for key, (old, _) in (planned or {}).items() if key in recipe})
    return {key: _plain(value) for key, value in sorted(recipe.items()) if _is_of_recipe(key)}


def _is_of_recipe(key: str) -> bool:
    test_only = any(part == "TEST" or part.endswith("_TEST") for part in key.split("."))
    return key not in _NOT_RECIPE and not test_only


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def recipe_changes(progress: Progress, recipe: Mapping[str, Any]) -> Changes:
    """Return the keys in which ``recipe`` differs from that of the stopped training.

    The config that a run leaves in its folder is planned already; it counts as the same recipe.
    A key that only one of the two has is one that another version has added.
    """
    written = dict(progress.recipe)
    planned = {
        key: _plain(pair[1])
        for key, pair in progress.plan.get("changes", {}).items()
        if key in written
    }
    before = (written, {**written, **planned})
    return min((_differences(old, recipe) for old in before), key=len)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    return {key: (old[key], new[key]) for key in old if key in new and old[key] != new[key]}


def refuse_changes(changes: Changes) -> None:
    """Raise if a recipe has changed.

    Raises:
        CheckpointError: with a line for each difference.
    """
    faults = [
        Fault(
            key,
            new,
            f"{old!r}, as in the training to resume",
            "resume with the recipe that it was started with, or accept the new one with "
            "--allow-changed-recipe (D2SCALE.ALLOW_CHANGED_RECIPE True)",
        )
        for key, (old, new) in changes.items()
    ]
    if faults:
        raise CheckpointError(faults)


def next_iteration(
    images_seen: int, *, recipe_images: int, ims_per_batch: int, max_iter: int
) -> int:
    """Return the iteration of a plan at which a training resumes.

    Counted from the end: the steps left are the fewest that show the rest of the recipe's
    images. So the training shows at least the recipe's images and less than one step more,
    and the schedule stands within one step of the images seen: at ``images_seen /
    ims_per_batch``, where that is a whole number.

    Args:
        images_seen: in the whole training so far.
        recipe_images: of the whole recipe, MAX_ITER times B0.
        ims_per_batch: total batch of the plan.
        max_iter: iterations of the plan, ``ceil(recipe_images / ims_per_batch)``.

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
    changes: Changes = {
        name: (old.get(key), new.get(key))
        for key, name in _PLAN_FACTS.items()
        if old.get(key) != new.get(key)
    }
    before, after = old.get("changes", {}), new.get("changes", {})
    for key in sorted({*before, *after}):
        written = before[key][0] if key in before else after[key][0]
        pair = tuple(_plain(plan[key][1] if key in plan else written) for plan in (before, after))
        if pair[0] != pair[1]:
            changes[key] = (pair[0], pair[1])
    return changes
