"""Read, check and scale the batch, the learning rate and the iterations of a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

from d2scale.config.defaults import QAT_ITERATION_KEYS
from d2scale.config.keys import get_key
from d2scale.config.upstream import SCHEDULES_WITHOUT_STEPS
from d2scale.config.value_rules import MOST_IMAGES, Rule, is_whole, judge, number, whole
from d2scale.errors import ConfigError, Fault
from d2scale.planning import rules

# Counted in iterations and scaled alike. WRITER_PERIOD, VIS_PERIOD and GATHER_METRIC_PERIOD
# are for the reader of the logs and stay.
ITERATION_KEYS = (
    "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
    *(f"QUANTIZATION.QAT.{key}" for key in QAT_ITERATION_KEYS),
)
# Counted as well, where the second is set.
_OBSERVER_PERIOD = "QUANTIZATION.QAT.UPDATE_OBSERVER_STATS_PERIOD"
_OBSERVED_PERIODICALLY = "QUANTIZATION.QAT.UPDATE_OBSERVER_STATS_PERIODICALLY"


def _are_moments(steps: Sequence[int]) -> bool:
    return all(map(is_whole, steps)) and all(a < b for a, b in pairwise([0, *steps]))


_WRITTEN_FOR = "the number of GPUs that the recipe was written for"
_RULES = (
    whole("SOLVER.REFERENCE_WORLD_SIZE", 0, MOST_IMAGES, advice=f"set it to {_WRITTEN_FOR}"),
    whole("SOLVER.IMS_PER_BATCH", 1, MOST_IMAGES, advice="set the recipe's total batch"),
    number("SOLVER.BASE_LR", above=0, advice="set the recipe's learning rate"),
    number("SOLVER.BASE_LR_END", least=0, advice="set it to 0"),
    whole("SOLVER.MAX_ITER", 1, advice="set the recipe's length"),
    *(whole(key, 0, advice="set it to 0 for never") for key in ITERATION_KEYS),
    whole(_OBSERVER_PERIOD, 1, advice="set it to 1 for every iteration"),
    whole(
        "D2SCALE.RECIPE_IMS_PER_BATCH",
        0,
        MOST_IMAGES,
        advice="set it to 0 for SOLVER.IMS_PER_BATCH",
    ),
)
# d2go's default of SOLVER.REFERENCE_WORLD_SIZE.
_USUAL_WORLD_SIZE = 8
# Images in a step of the recipe whose iterations a config counts; 0: SOLVER.IMS_PER_BATCH.
RECIPE_IMS_PER_BATCH = "D2SCALE.RECIPE_IMS_PER_BATCH"
_STEPS = Rule("SOLVER.STEPS", "iterations from 1, strictly increasing", _are_moments)
_EMA_DECAY = number("MODEL_EMA.DECAY", least=0, most=1, advice="set it to 0.999")


@dataclass(frozen=True)
class Schedule:
    """The part of a recipe that depends on its total batch."""

    reference_world_size: int  # GPUs that the recipe was written for (N0)
    ims_per_batch: int  # images in one optimizer step
    # Images for which one iteration of the schedule counts (B0): those of a step, but by the gain
    # rule those of the recipe's.
    recipe_ims_per_batch: int
    base_lr: float  # learning rate per step
    base_lr_end: float  # the one a cosine schedule ends with
    max_iter: int  # optimizer steps in the whole training
    # Iterations at which the learning rate drops; none under a schedule that does not read STEPS.
    steps: tuple[int, ...]
    iterations: Mapping[str, int]  # the other counts of iterations, by config key
    # Per-step decay of the averaged weights, None without such an average. DECAY_WARM_UP_FACTOR f
    # stays: after n updates its (1 + n) / (f + n) averages over the last n / (f - 1), of any size.
    ema_decay: float | None
    optimizer: str  # name, lower case

    @classmethod
    def from_cfg(cls, cfg: Any) -> Schedule:
        """Read the schedule of a detectron2, d2go or d2scale config without faults.

        Keys that the engine does not have (QAT in detectron2, say) are left out.
        """
        periodic = get_key(cfg, _OBSERVED_PERIODICALLY, False)
        keys = (*ITERATION_KEYS, _OBSERVER_PERIOD) if periodic else ITERATION_KEYS
        counts = {key: get_key(cfg, key) for key in keys}
        ema = get_key(cfg, "MODEL_EMA.ENABLED", False)
        return cls(
            reference_world_size=reference_world_size(cfg),
            ims_per_batch=cfg.SOLVER.IMS_PER_BATCH,
            recipe_ims_per_batch=recipe_ims_per_batch(cfg),
            base_lr=cfg.SOLVER.BASE_LR,
            base_lr_end=get_key(cfg, "SOLVER.BASE_LR_END", 0.0),
            max_iter=cfg.SOLVER.MAX_ITER,
            steps=tuple(cfg.SOLVER.STEPS) if _reads_steps(cfg) else (),
            iterations={key: count for key, count in counts.items() if count is not None},
            ema_decay=cfg.MODEL_EMA.DECAY if ema else None,
            optimizer=str(get_key(cfg, "SOLVER.OPTIMIZER", "sgd")).lower(),
        )

    @property
    def reached_steps(self) -> tuple[int, ...]:
        """The drops before the training ends; detectron2 leaves the others out too."""
        return tuple(step for step in self.steps if step < self.max_iter)

    def to_config(self) -> dict[str, Any]:
        """Return the schedule as dotted config keys, sorted."""
        counts_steps = self.recipe_ims_per_batch == self.ims_per_batch
        values: dict[str, Any] = {
            RECIPE_IMS_PER_BATCH: 0 if counts_steps else self.recipe_ims_per_batch,
            "SOLVER.BASE_LR": self.base_lr,
            "SOLVER.BASE_LR_END": self.base_lr_end,
            "SOLVER.IMS_PER_BATCH": self.ims_per_batch,
            "SOLVER.MAX_ITER": self.max_iter,
            "SOLVER.REFERENCE_WORLD_SIZE": self.reference_world_size,
            "SOLVER.STEPS": self.steps,
            **self.iterations,
        }
        if self.ema_decay is not None:
            values["MODEL_EMA.DECAY"] = self.ema_decay
        return dict(sorted(values.items()))

    def scaled(self, ims_per_batch: int, world_size: int, lr_rule: str) -> Schedule:
        """Return the same training with another total batch, in images, on other ranks.

        Before, written for 64 GPUs::

            SOLVER: {REFERENCE_WORLD_SIZE: 64, IMS_PER_BATCH: 128, BASE_LR: 0.01,
                     MAX_ITER: 90000, STEPS: [60000, 80000], WARMUP_ITERS: 1000}

        After ``scaled(2, 1, "linear")``, as on one GPU::

            SOLVER: {REFERENCE_WORLD_SIZE: 1, IMS_PER_BATCH: 2, BASE_LR: 0.00015625,
                     MAX_ITER: 5760000, STEPS: [3840000, 5120000], WARMUP_ITERS: 64000}

        By the ``gain`` rule only the total batch and the ranks change: the schedule is read at the
        recipe's steps done.

        Raises:
            ConfigError: if the training becomes too short for its learning-rate drops.
        """
        rescaled = replace(self, reference_world_size=world_size, ims_per_batch=ims_per_batch)
        if lr_rule == "gain":
            return replace(rescaled, steps=self.reached_steps)
        ratio = Fraction(ims_per_batch, self.recipe_ims_per_batch)
        max_iter = rules.scale_max_iter(self.max_iter, ratio)
        try:
            steps = rules.scale_steps(self.reached_steps, ratio, max_iter)
        except ValueError as error:
            raise ConfigError([self._too_many_drops(ims_per_batch, max_iter)]) from error
        return replace(
            rescaled,
            recipe_ims_per_batch=ims_per_batch,
            base_lr=rules.scale_learning_rate(self.base_lr, ratio, lr_rule),
            base_lr_end=rules.scale_learning_rate(self.base_lr_end, ratio, lr_rule),
            max_iter=max_iter,
            steps=steps,
            iterations={k: rules.scale_count(v, ratio) for k, v in self.iterations.items()},
            ema_decay=self.ema_decay and rules.scale_ema_decay(self.ema_decay, ratio),
        )

    def _too_many_drops(self, ims_per_batch: int, max_iter: int) -> Fault:
        allowed = (
            f"fewer than {max_iter} steps, because with {ims_per_batch} images a step the "
            f"training has {max_iter} iterations"
        )
        advice = "use a smaller batch (D2SCALE.MAX_IMS_PER_BATCH) or fewer SOLVER.STEPS"
        return Fault("SOLVER.STEPS", self.steps, allowed, advice)


def reference_world_size(cfg: Any) -> int:
    """Return the GPUs that a recipe was written for (N0).

    One that does not say so was written for 8, as d2go has it, or for the most below that which
    can share its batch evenly, for neither d2go nor detectron2 trains otherwise.
    """
    images = cfg.SOLVER.IMS_PER_BATCH
    fitting = (gpus for gpus in range(_USUAL_WORLD_SIZE, 0, -1) if images % gpus == 0)
    return int(cfg.SOLVER.REFERENCE_WORLD_SIZE or next(fitting))


def schedule_notes(cfg: Any, schedule: Schedule) -> list[str]:
    """Return what was taken for granted of a recipe, for its user to know."""
    notes = []
    gpus = schedule.reference_world_size
    if not cfg.SOLVER.REFERENCE_WORLD_SIZE and gpus != _USUAL_WORLD_SIZE:
        notes.append(
            f"the recipe does not say for how many GPUs it is (SOLVER.REFERENCE_WORLD_SIZE): "
            f"taken as {gpus}, the most up to {_USUAL_WORLD_SIZE} that share its "
            f"{schedule.ims_per_batch} images"
        )
    if schedule.reached_steps != schedule.steps:
        notes.append(
            f"SOLVER.STEPS {schedule.steps} do not all come before SOLVER.MAX_ITER = "
            f"{schedule.max_iter}: the others have no effect"
        )
    if get_key(cfg, "TEST.PRECISE_BN.ENABLED", False):
        batches = cfg.TEST.PRECISE_BN.NUM_ITER
        notes.append(f"TEST.PRECISE_BN.NUM_ITER stays {batches} batches of a GPU, of its size now")
    return notes


def _reads_steps(cfg: Any) -> bool:
    return get_key(cfg, "SOLVER.LR_SCHEDULER_NAME") not in SCHEDULES_WITHOUT_STEPS


def follows_gain(cfg: Any) -> bool:
    """Return whether a planned config trains by the gain rule."""
    return bool(get_key(cfg, rules.LR_RULE) == "gain")


def recipe_ims_per_batch(cfg: Any) -> int:
    """Return the images for which an iteration of a config's schedule counts."""
    return int(get_key(cfg, RECIPE_IMS_PER_BATCH, 0) or cfg.SOLVER.IMS_PER_BATCH)


def schedule_faults(cfg: Any) -> list[Fault]:
    """Return the faults of all keys of ``cfg`` that a schedule is made of."""
    ema = get_key(cfg, "MODEL_EMA.ENABLED", False)
    judged = [*_RULES, *([_EMA_DECAY] if ema else []), *([_STEPS] if _reads_steps(cfg) else [])]
    faults = judge(cfg, judged)
    # Keys are compared only where each is right by itself.
    if not {f.key for f in faults} & {"SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE"}:
        gpus = cfg.SOLVER.REFERENCE_WORLD_SIZE
        faults += Rule(
            "SOLVER.IMS_PER_BATCH",
            f"at least one image for each of SOLVER.REFERENCE_WORLD_SIZE = {gpus} GPUs",
            lambda images: images >= gpus,
            f"set REFERENCE_WORLD_SIZE to {_WRITTEN_FOR}, or to 0 if that is not known",
        ).faults(cfg.SOLVER.IMS_PER_BATCH)
    return faults
