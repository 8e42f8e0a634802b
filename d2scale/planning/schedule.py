"""Read, check and scale the batch, the learning rate and the iterations of a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

from d2scale.config.defaults import QAT_ITERATION_KEYS
from d2scale.config.keys import get_key
from d2scale.config.value_rules import Rule, is_whole, judge, number, whole
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


def _are_moments(steps: Sequence[int]) -> bool:
    return all(map(is_whole, steps)) and all(a < b for a, b in pairwise([0, *steps]))


_RULES = (
    whole(
        "SOLVER.REFERENCE_WORLD_SIZE",
        1,
        advice="set it to the number of GPUs that the recipe was written for",
    ),
    whole("SOLVER.IMS_PER_BATCH", 1, advice="set the recipe's total batch"),
    number("SOLVER.BASE_LR", above=0, advice="set the recipe's learning rate"),
    number("SOLVER.BASE_LR_END", least=0, advice="set it to 0"),
    whole("SOLVER.MAX_ITER", 1, advice="set the recipe's length"),
    Rule("SOLVER.STEPS", "iterations from 1, strictly increasing", _are_moments),
    *(whole(key, 0, advice="set it to 0 for never") for key in ITERATION_KEYS),
)
_EMA_DECAY = number("MODEL_EMA.DECAY", least=0, most=1, advice="set it to 0.999")


@dataclass(frozen=True)
class Schedule:
    """The part of a recipe that depends on its total batch.

    Attributes:
        reference_world_size: GPUs that the recipe was written for (N0).
        ims_per_batch: images in one optimizer step (B0).
        base_lr: learning rate per step, and the one a cosine schedule ends with.
        max_iter: optimizer steps in the whole training.
        steps: iterations at which the learning rate drops.
        iterations: the other counts of iterations, by config key.
        ema_decay: per-step decay of the averaged weights, None without such an average.
        optimizer: name, lower case.
    """

    reference_world_size: int
    ims_per_batch: int
    base_lr: float
    base_lr_end: float
    max_iter: int
    steps: tuple[int, ...]
    iterations: Mapping[str, int]
    ema_decay: float | None
    optimizer: str

    @classmethod
    def from_cfg(cls, cfg: Any) -> Schedule:
        """Read the schedule of a detectron2, d2go or d2scale config without faults.

        Keys that the engine does not have (QAT in detectron2, say) are left out.
        """
        counts = {key: get_key(cfg, key) for key in ITERATION_KEYS}
        ema = get_key(cfg, "MODEL_EMA.ENABLED", False)
        return cls(
            reference_world_size=cfg.SOLVER.REFERENCE_WORLD_SIZE,
            ims_per_batch=cfg.SOLVER.IMS_PER_BATCH,
            base_lr=cfg.SOLVER.BASE_LR,
            base_lr_end=get_key(cfg, "SOLVER.BASE_LR_END", 0.0),
            max_iter=cfg.SOLVER.MAX_ITER,
            steps=tuple(cfg.SOLVER.STEPS),
            iterations={key: count for key, count in counts.items() if count is not None},
            ema_decay=cfg.MODEL_EMA.DECAY if ema else None,
            optimizer=str(get_key(cfg, "SOLVER.OPTIMIZER", "sgd")).lower(),
        )

    def to_config(self) -> dict[str, Any]:
        """Return the schedule as dotted config keys, sorted."""
        values: dict[str, Any] = {
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
        """Return the same training with another total batch on another number of ranks.

        Before, written for 64 GPUs::

            SOLVER: {REFERENCE_WORLD_SIZE: 64, IMS_PER_BATCH: 128, BASE_LR: 0.01,
                     MAX_ITER: 90000, STEPS: [60000, 80000], WARMUP_ITERS: 1000}

        After ``scaled(2, 1, "linear")``, as on one GPU::

            SOLVER: {REFERENCE_WORLD_SIZE: 1, IMS_PER_BATCH: 2, BASE_LR: 0.00015625,
                     MAX_ITER: 5760000, STEPS: [3840000, 5120000], WARMUP_ITERS: 64000}

        Args:
            ims_per_batch: the new total batch, in images.
            world_size: the ranks that will run.
            lr_rule: ``linear``, ``sqrt`` or ``none``.

        Raises:
            ConfigError: if the training becomes too short for its learning-rate drops.
        """
        ratio = Fraction(ims_per_batch, self.ims_per_batch)
        max_iter = rules.scale_max_iter(self.max_iter, ratio)
        try:
            steps = rules.scale_steps(self.steps, ratio, max_iter)
        except ValueError as error:
            raise ConfigError([self._too_short(ims_per_batch, max_iter)]) from error
        return replace(
            self,
            reference_world_size=world_size,
            ims_per_batch=ims_per_batch,
            base_lr=rules.scale_learning_rate(self.base_lr, ratio, lr_rule),
            base_lr_end=rules.scale_learning_rate(self.base_lr_end, ratio, lr_rule),
            max_iter=max_iter,
            steps=steps,
            iterations={k: rules.scale_count(v, ratio) for k, v in self.iterations.items()},
            ema_decay=None
            if self.ema_decay is None
            else rules.scale_ema_decay(self.ema_decay, ratio),
        )

    def _too_short(self, ims_per_batch: int, max_iter: int) -> Fault:
        return Fault(
            "SOLVER.STEPS",
            self.steps,
            f"fewer than {max_iter} steps, because with {ims_per_batch} images a step the "
            f"training has {max_iter} iterations",
            "use a smaller batch (D2SCALE.MAX_IMS_PER_BATCH) or fewer SOLVER.STEPS",
        )


def schedule_faults(cfg: Any) -> list[Fault]:
    """Return the faults of all keys of ``cfg`` that a schedule is made of."""
    ema = get_key(cfg, "MODEL_EMA.ENABLED", False)
    faults = judge(cfg, (*_RULES, _EMA_DECAY) if ema else _RULES)
    # Keys are compared only where each is right by itself.
    wrong = {fault.key for fault in faults}
    solver = cfg.SOLVER
    if not wrong & {"SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE"}:
        faults += _smallest_batch(solver.REFERENCE_WORLD_SIZE).faults(solver.IMS_PER_BATCH)
    if not wrong & {"SOLVER.STEPS", "SOLVER.MAX_ITER"}:
        faults += _latest_step(solver.MAX_ITER).faults(solver.STEPS)
    return faults


def _smallest_batch(reference_world_size: int) -> Rule:
    return Rule(
        "SOLVER.IMS_PER_BATCH",
        f"at least one image for each of SOLVER.REFERENCE_WORLD_SIZE = {reference_world_size} GPUs",
        lambda images: images >= reference_world_size,
        "set REFERENCE_WORLD_SIZE to the number of GPUs that the recipe was written for "
        "(8 when the config leaves it out)",
    )


def _latest_step(max_iter: int) -> Rule:
    return Rule(
        "SOLVER.STEPS",
        f"below SOLVER.MAX_ITER = {max_iter}",
        lambda steps: not steps or steps[-1] < max_iter,
        "raise MAX_ITER, or remove the steps that are never reached "
        "(none at all: SOLVER.STEPS '()')",
    )


def differences(old: Schedule, new: Schedule) -> dict[str, tuple[Any, Any]]:
    """Return the config keys in which two schedules differ, with both values."""
    after = new.to_config()
    return {
        key: (value, after[key]) for key, value in old.to_config().items() if value != after[key]
    }
