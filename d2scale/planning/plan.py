"""Plan how a recipe runs on the hardware at hand, with the reason for each choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from d2scale.config.keys import differences, get_key, set_key
from d2scale.config.value_rules import judge, one_of
from d2scale.errors import ConfigError, DataError, Fault
from d2scale.planning import rules
from d2scale.planning.batch import BATCH_RULES, decide_batch
from d2scale.planning.hardware import Hardware
from d2scale.planning.methods import METHODS, method_faults, method_of
from d2scale.planning.schedule import Schedule, schedule_faults


@dataclass(frozen=True)
class Plan:
    """How a recipe runs on some hardware."""

    method: str  # per_gpu, keep_total or max_memory
    world_size: int  # ranks (N)
    ims_per_gpu: int  # images in the largest micro-batch of any rank (m)
    accumulation_steps: int  # most micro-batches of any rank in one optimizer step (a)
    ims_per_batch: int  # images in one optimizer step (B)
    batch_ratio: float  # k = B / B0
    lr_rule: str  # linear, sqrt or none
    predicted_peak_gib: float | None  # device memory of one rank, None if no profile is at hand
    changes: dict[str, tuple[Any, Any]]  # config key to (recipe's value, planned value)
    notes: tuple[str, ...]  # the reasons, and what the user should know

    def apply(self, cfg: Any) -> Any:
        """Return a copy of ``cfg`` with the planned values; keys it lacks are passed over."""
        planned = cfg.clone()
        frozen = planned.is_frozen()
        planned.defrost()
        for key, (_, value) in self.changes.items():
            if get_key(planned, key) is not None:
                set_key(planned, key, value)
        if frozen:
            planned.freeze()
        return planned

    def with_smaller_micro_batches(self, ims_per_gpu: int) -> Plan:
        """Return the plan after an out-of-memory error has cut the run to ``ims_per_gpu``."""
        sizes = rules.micro_batch_sizes(self.ims_per_batch, self.world_size, ims_per_gpu)
        cut = f"images per GPU cut from {self.ims_per_gpu} to {ims_per_gpu}"
        note = f"{cut} during the run, by an out-of-memory error"
        return replace(
            self,
            ims_per_gpu=max(map(max, sizes)),
            accumulation_steps=max(map(len, sizes)),
            # It was too low, or other programs have taken memory.
            predicted_peak_gib=None,
            notes=(*self.notes, note),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values, in the documented order."""
        content = dict(vars(self))
        content["changes"] = {key: list(pair) for key, pair in self.changes.items()}
        content["notes"] = list(self.notes)
        return content


def make_plan(
    cfg: Any, hardware: Hardware, *, method: str | None = None, lr_rule: str | None = None
) -> Plan:
    """Decide how the recipe in ``cfg`` runs on ``hardware``.

    Args:
        cfg: a detectron2, d2go or d2scale config; it is not changed.
        method: one of ``METHODS``; None takes the one that ``SOLVER.AUTO_SCALING_METHODS``
            names, or else ``keep_total``, which changes nothing about the training.
        lr_rule: one of ``rules.LR_RULES``; None takes ``D2SCALE.LR_RULE``.

    Raises:
        ConfigError: with all faults of the recipe and the request.
    """
    lr_rule = lr_rule or get_key(cfg, "D2SCALE.LR_RULE", "auto")
    if faults := [*schedule_faults(cfg), *_request_faults(cfg, method, lr_rule)]:
        raise ConfigError(faults)
    if method is None:
        method = method_of(get_key(cfg, "SOLVER.AUTO_SCALING_METHODS", ()))
    schedule = Schedule.from_cfg(cfg)
    batch = decide_batch(cfg, method, schedule, hardware)
    rule = rules.resolve_lr_rule(lr_rule, schedule.optimizer)
    planned = schedule.scaled(batch.ims_per_batch, hardware.world_size, rule)
    accumulates = batch.accumulation_steps > 1
    return Plan(
        method=method,
        world_size=hardware.world_size,
        ims_per_gpu=batch.ims_per_gpu,
        accumulation_steps=batch.accumulation_steps,
        ims_per_batch=batch.ims_per_batch,
        batch_ratio=batch.ims_per_batch / schedule.ims_per_batch,
        lr_rule=rule,
        predicted_peak_gib=hardware.peak_gib(batch.ims_per_gpu, accumulates=accumulates),
        changes=differences(schedule.to_config(), planned.to_config()),
        notes=(*batch.notes, *_schedule_notes(schedule, planned, lr_rule)),
    )


def refuse_more_than_all(plan: Plan, images: int) -> None:
    """Raise a DataError if ``max_memory`` chose a total batch larger than the dataset.

    ``images`` are those of the training dataset, 0 if that is not known.
    """
    if plan.method == "max_memory" and 0 < images < plan.ims_per_batch:
        advice = f"set D2SCALE.MAX_IMS_PER_BATCH to at most {images}, or train on more images"
        allowed = f"at least the {plan.ims_per_batch} images of the chosen total batch"
        raise DataError([Fault("images in DATASETS.TRAIN", images, allowed, advice)])


def _request_faults(cfg: Any, method: str | None, lr_rule: str) -> list[Fault]:
    if method is None:
        faults = method_faults(get_key(cfg, "SOLVER.AUTO_SCALING_METHODS", ()))
    else:
        faults = one_of("method", METHODS).faults(method)
    faults += one_of("D2SCALE.LR_RULE", rules.LR_RULES).faults(lr_rule)
    return faults + judge(cfg, BATCH_RULES)


def _schedule_notes(schedule: Schedule, planned: Schedule, lr_rule: str) -> list[str]:
    notes = []
    known = schedule.optimizer.startswith(("sgd", "adam"))
    if lr_rule == "auto" and not known and planned.base_lr != schedule.base_lr:
        notes.append(
            f"optimizer {schedule.optimizer} is not known; its learning rate is scaled linearly "
            "(D2SCALE.LR_RULE chooses)"
        )
    extra = planned.max_iter * planned.ims_per_batch - schedule.max_iter * schedule.ims_per_batch
    if extra:
        notes.append(f"the last step rounds up: {extra} images more than the recipe's training")
    return notes
