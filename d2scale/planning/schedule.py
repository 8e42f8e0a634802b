"""What a config says about batch, learning rate and iterations: read, checked, scaled, written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from d2scale.config.defaults import QAT_ITERATION_KEYS
from d2scale.config.keys import get_key
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
        """Read the schedule of a detectron2, d2go or d2scale config.

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

    def faults(self) -> list[Fault]:
        """Return everything that makes this schedule meaningless."""
        found = [*self._batch_faults(), *self._rate_faults(), *self._step_faults()]
        for key, count in self.iterations.items():
            if count < 0:
                found.append(Fault(key, count, "0 (never) or more iterations", "set it to 0"))
        return found

    def _batch_faults(self) -> list[Fault]:
        found = []
        if self.reference_world_size < 1:
            found.append(
                Fault(
                    "SOLVER.REFERENCE_WORLD_SIZE",
                    self.reference_world_size,
                    "1 or more",
                    "set it to the number of GPUs that the recipe was written for",
                )
            )
        if self.ims_per_batch < max(1, self.reference_world_size):
            found.append(
                Fault(
                    "SOLVER.IMS_PER_BATCH",
                    self.ims_per_batch,
                    f"at least one image for each of SOLVER.REFERENCE_WORLD_SIZE = "
                    f"{self.reference_world_size} GPUs",
                    "set REFERENCE_WORLD_SIZE to the number of GPUs that the recipe was "
                    "written for (8 when the config leaves it out)",
                )
            )
        return found

    def _rate_faults(self) -> list[Fault]:
        found = []
        if not 0 < self.base_lr < float("inf"):
            found.append(
                Fault("SOLVER.BASE_LR", self.base_lr, "above 0", "set the recipe's learning rate")
            )
        if not 0 <= self.base_lr_end < float("inf"):
            found.append(Fault("SOLVER.BASE_LR_END", self.base_lr_end, "0 or more", "set it to 0"))
        if self.ema_decay is not None and not 0 <= self.ema_decay <= 1:
            found.append(
                Fault("MODEL_EMA.DECAY", self.ema_decay, "between 0 and 1", "set it to 0.999")
            )
        return found

    def _step_faults(self) -> list[Fault]:
        found = []
        if self.max_iter < 1:
            found.append(
                Fault("SOLVER.MAX_ITER", self.max_iter, "1 or more", "set the recipe's length")
            )
        rising = all(a < b for a, b in zip(self.steps, self.steps[1:], strict=False))
        if any(not isinstance(step, int) or step < 1 for step in self.steps):
            allowed, advice = "iterations of 1 or more", "correct them"
        elif not rising:
            allowed, advice = "strictly increasing", "put them in order"
        elif self.max_iter >= 1 and self.steps and self.steps[-1] >= self.max_iter:
            allowed = f"below SOLVER.MAX_ITER = {self.max_iter}"
            advice = (
                "raise MAX_ITER, or remove the steps that are never reached "
                "(none at all: SOLVER.STEPS '()')"
            )
        else:
            return found
        return [*found, Fault("SOLVER.STEPS", self.steps, allowed, advice)]


def differences(old: Schedule, new: Schedule) -> dict[str, tuple[Any, Any]]:
    """Return the config keys in which two schedules differ, with both values."""
    after = new.to_config()
    return {
        key: (value, after[key]) for key, value in old.to_config().items() if value != after[key]
    }
