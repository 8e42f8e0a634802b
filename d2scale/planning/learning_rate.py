"""Choose the rule by which a plan's learning rate follows its total batch, and say why."""

from __future__ import annotations

from d2scale.errors import ConfigError, Fault
from d2scale.planning import rules
from d2scale.planning.gain import range_of_steps
from d2scale.planning.rules import LR_RULE
from d2scale.planning.schedule import Schedule


def choose_rule(
    asked: str, method: str, schedule: Schedule, ims_per_batch: int, *, takes_steps: bool
) -> str:
    """Return the rule for a recipe that runs with ``ims_per_batch`` images a step.

    ``auto`` is the gain rule for a larger batch than the recipe's that is taken for its own sake,
    with SGD, if what will train ``takes_steps``: of all rules it alone keeps the recipe's
    quality there. With a smaller batch the linear rule keeps it, and the gain rule loses it
    (docs/larger_batches.md has the evidence).

    Raises:
        ConfigError: if the gain rule is asked for and cannot be followed.
    """
    rule = rules.resolve_lr_rule(
        asked,
        schedule.optimizer,
        prefers_gain=takes_steps and _is_larger_by_choice(method, schedule, ims_per_batch),
    )
    if rule == "gain" and (fault := _gain_fault(schedule, ims_per_batch, takes_steps)):
        raise ConfigError([fault])
    return rule


def _is_larger_by_choice(method: str, schedule: Schedule, ims_per_batch: int) -> bool:
    """Return whether a larger batch than the recipe's was asked for, and leaves enough steps."""
    asked = method == "max_memory" or schedule.ims_per_batch != schedule.recipe_ims_per_batch
    larger = ims_per_batch > schedule.recipe_ims_per_batch
    return asked and larger and _leaves_steps(schedule, ims_per_batch)


def _leaves_steps(schedule: Schedule, ims_per_batch: int) -> bool:
    """Return whether there may be more steps than learning-rate drops, and a whole one at least."""
    images = schedule.max_iter * schedule.recipe_ims_per_batch
    return ims_per_batch <= images and _fewest_steps(schedule, ims_per_batch) > len(
        schedule.reached_steps
    )


def _fewest_steps(schedule: Schedule, ims_per_batch: int) -> int:
    return range_of_steps(schedule.max_iter, ims_per_batch, schedule.recipe_ims_per_batch)[0]


def _gain_fault(schedule: Schedule, ims_per_batch: int, takes_steps: bool) -> Fault | None:
    """Return why the gain rule cannot be followed, None if it can."""
    allowed = "auto, linear, sqrt or none"
    if not takes_steps:
        where = "where d2scale does not take the optimizer steps"
        advice = "take linear, or train with d2scale train or d2scale's Runner"
    elif not rules.gain_is_proven_for(schedule.optimizer):
        where = f"with SOLVER.OPTIMIZER {schedule.optimizer}"
        advice = "take sqrt: the gain rule is proven for SGD alone"
    elif ims_per_batch < 2:
        where = "with a total batch of one image"
        advice = "take a larger batch: noise is measured between two parts of a step"
    elif not _leaves_steps(schedule, ims_per_batch):
        where = f"with a batch of {ims_per_batch} images"
        advice = (
            f"take a smaller batch (D2SCALE.MAX_IMS_PER_BATCH): {schedule.max_iter} steps of "
            f"{schedule.recipe_ims_per_batch} images could become "
            f"{_fewest_steps(schedule, ims_per_batch)}"
        )
    else:
        return None
    return Fault(LR_RULE, "gain", f"{allowed} {where}", advice)


def rule_notes(asked: str, rule: str, schedule: Schedule, planned: Schedule) -> list[str]:
    """Return what the user should know about the rule that was chosen."""
    if rule == "gain":
        return _gain_notes(schedule, planned)
    notes = []
    larger = planned.ims_per_batch > schedule.ims_per_batch
    if (
        asked == "auto"
        and rule == "linear"
        and larger
        and rules.gain_is_proven_for(schedule.optimizer)
    ):
        notes.append(
            "the learning rate is scaled linearly, which may cost quality; the gain rule "
            "(D2SCALE.LR_RULE gain), followed by d2scale's own training, keeps it"
        )
    known = schedule.optimizer.startswith(("sgd", "adam"))
    if asked == "auto" and not known and planned.base_lr != schedule.base_lr:
        notes.append(
            f"optimizer {schedule.optimizer} is not known; its learning rate is scaled linearly "
            "(D2SCALE.LR_RULE chooses)"
        )
    extra = planned.max_iter * planned.ims_per_batch
    extra -= schedule.max_iter * schedule.recipe_ims_per_batch
    if extra:
        notes.append(f"the last step rounds up: {extra} images more than the recipe's training")
    return notes


def _gain_notes(schedule: Schedule, planned: Schedule) -> list[str]:
    ratio = planned.ims_per_batch / planned.recipe_ims_per_batch
    if ratio == 1:
        return ["with the recipe's own batch the gain of a step is always 1"]
    low, high = sorted((1.0, ratio))
    notes = [
        f"a step counts for {low:.3g} to {high:.3g} of the recipe's {schedule.max_iter}, by "
        "the noise of its gradient; rate, warm-up, drops and periods are read on that count"
    ]
    if ratio < 1:
        notes.append(
            "with a smaller batch than the recipe's the gain rule takes too few steps to keep its "
            "quality; linear keeps it"
        )
    return notes
