"""The plan: a recipe on the hardware at hand, decided, with the reason for each choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from d2scale.config.keys import get_key, set_key
from d2scale.errors import ConfigError, DataError, Fault
from d2scale.planning import rules
from d2scale.planning.hardware import Hardware
from d2scale.planning.methods import METHODS, method_of
from d2scale.planning.schedule import Schedule, differences


@dataclass(frozen=True)
class Plan:
    """A decided training.

    Attributes:
        method: ``per_gpu``, ``keep_total`` or ``max_memory``.
        world_size: ranks (N).
        ims_per_gpu: images in the largest micro-batch of any rank (m).
        accumulation_steps: most micro-batches of any rank in one optimizer step (a).
        ims_per_batch: images in one optimizer step (B).
        batch_ratio: k = B / B0.
        lr_rule: ``linear``, ``sqrt`` or ``none``.
        predicted_peak_gib: device memory of one rank, None if no profile is at hand.
        changes: config key to (recipe's value, planned value).
        notes: the reasons, and what the user should know.
    """

    method: str
    world_size: int
    ims_per_gpu: int
    accumulation_steps: int
    ims_per_batch: int
    batch_ratio: float
    lr_rule: str
    predicted_peak_gib: float | None
    changes: dict[str, tuple[Any, Any]]
    notes: tuple[str, ...]

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
        """Return the plan of a run that an out-of-memory error has cut to ``ims_per_gpu``."""
        sizes = rules.micro_batch_sizes(self.ims_per_batch, self.world_size, ims_per_gpu)
        note = (
            f"images per GPU cut from {self.ims_per_gpu} to {ims_per_gpu} during the run, by an "
            "out-of-memory error"
        )
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


@dataclass
class _Decision:
    """Batch and micro-batches while they are being decided."""

    ims_per_batch: int
    ims_per_gpu: int
    notes: list[str] = field(default_factory=list)


def make_plan(
    cfg: Any, hardware: Hardware, *, method: str | None = None, lr_rule: str | None = None
) -> Plan:
    """Decide how the recipe in ``cfg`` runs on ``hardware``.

    Args:
        cfg: a detectron2, d2go or d2scale config; it is not changed.
        hardware: what is at hand.
        method: one of ``METHODS``; None takes the one that ``SOLVER.AUTO_SCALING_METHODS``
            names, or else ``keep_total``, which changes nothing about the training.
        lr_rule: one of ``rules.LR_RULES``; None takes ``D2SCALE.LR_RULE``.

    Raises:
        ConfigError: with all faults of the recipe and the request.
    """
    schedule = Schedule.from_cfg(cfg)
    lr_rule = lr_rule or get_key(cfg, "D2SCALE.LR_RULE", "auto")
    faults = schedule.faults()
    try:
        method = method or method_of(get_key(cfg, "SOLVER.AUTO_SCALING_METHODS", ()))
    except ConfigError as error:
        faults += error.faults
    faults += _request_faults(cfg, method, lr_rule)
    if faults or method is None:
        raise ConfigError(faults)
    decision = _DECIDE[method](cfg, schedule, hardware)
    rule = rules.resolve_lr_rule(lr_rule, schedule.optimizer)
    planned = schedule.scaled(decision.ims_per_batch, hardware.world_size, rule)
    sizes = rules.micro_batch_sizes(
        decision.ims_per_batch, hardware.world_size, decision.ims_per_gpu
    )
    ims_per_gpu = max(max(rank) for rank in sizes)
    steps = max(len(rank) for rank in sizes)
    return Plan(
        method=method,
        world_size=hardware.world_size,
        ims_per_gpu=ims_per_gpu,
        accumulation_steps=steps,
        ims_per_batch=decision.ims_per_batch,
        batch_ratio=decision.ims_per_batch / schedule.ims_per_batch,
        lr_rule=rule,
        predicted_peak_gib=hardware.peak_gib(ims_per_gpu, accumulates=steps > 1),
        changes=differences(schedule, planned),
        notes=(
            *decision.notes,
            *_split_notes(sizes),
            *_schedule_notes(schedule, planned, lr_rule),
        ),
    )


def refuse_more_than_all(plan: Plan, images: int) -> None:
    """Refuse a total batch that was chosen to fill the memory and exceeds the dataset.

    Args:
        plan: of any method; only ``max_memory`` chooses its total batch.
        images: in the training dataset, 0 if that is not known.

    Raises:
        DataError: if the batch is larger.
    """
    if plan.method == "max_memory" and 0 < images < plan.ims_per_batch:
        advice = f"set D2SCALE.MAX_IMS_PER_BATCH to at most {images}, or train on more images"
        allowed = f"at least the {plan.ims_per_batch} images of the chosen total batch"
        raise DataError([Fault("images in DATASETS.TRAIN", images, allowed, advice)])


def _request_faults(cfg: Any, method: str | None, lr_rule: str) -> list[Fault]:
    faults = []
    if method is not None and method not in METHODS:
        faults.append(Fault("method", method, ", ".join(METHODS), "choose one"))
    if lr_rule not in rules.LR_RULES:
        faults.append(Fault("D2SCALE.LR_RULE", lr_rule, ", ".join(rules.LR_RULES), "choose one"))
    for key in ("D2SCALE.MAX_IMS_PER_BATCH", "D2SCALE.ACCUMULATION_STEPS"):
        value = get_key(cfg, key, 0)
        if value < 0:
            faults.append(Fault(key, value, "0 (no limit, decide) or more", "correct it"))
    return faults


def _keep_total(cfg: Any, schedule: Schedule, hardware: Hardware) -> _Decision:
    total = schedule.ims_per_batch
    if total < hardware.world_size:
        raise ConfigError([_fewer_images_than_gpus(total, hardware.world_size)])
    return _fit_share(cfg, total, hardware)


def _per_gpu(cfg: Any, schedule: Schedule, hardware: Hardware) -> _Decision:
    exact = Fraction(hardware.world_size * schedule.ims_per_batch, schedule.reference_world_size)
    total = max(hardware.world_size, round(exact))
    decision = _fit_share(cfg, total, hardware)
    if total != exact:
        decision.notes.append(
            f"{schedule.ims_per_batch} images on {schedule.reference_world_size} GPUs are "
            f"{float(exact):.2f} on {hardware.world_size}, rounded to {total}"
        )
    return decision


def _max_memory(cfg: Any, schedule: Schedule, hardware: Hardware) -> _Decision:
    steps = get_key(cfg, "D2SCALE.ACCUMULATION_STEPS", 0) or 1
    largest = hardware.largest_fit(accumulates=steps > 1)
    if largest is None:
        raise ConfigError([_nothing_to_fill(hardware)])
    cap = get_key(cfg, "D2SCALE.MAX_IMS_PER_BATCH", 0)
    notes = [_reason_for_largest(hardware, largest)]
    total = hardware.world_size * largest * steps
    if cap and total > cap:
        if cap < hardware.world_size:
            raise ConfigError(
                [
                    Fault(
                        "D2SCALE.MAX_IMS_PER_BATCH",
                        cap,
                        f"at least one image for each of {hardware.world_size} GPUs",
                        "raise it or use fewer GPUs",
                    )
                ]
            )
        notes.append(f"total batch {total} cut to D2SCALE.MAX_IMS_PER_BATCH = {cap}")
        total = cap
    return _Decision(total, largest, notes)


_DECIDE = {"per_gpu": _per_gpu, "keep_total": _keep_total, "max_memory": _max_memory}


def _fit_share(cfg: Any, total: int, hardware: Hardware) -> _Decision:
    """Choose m for a total batch that is given: the whole share of a GPU, if it fits."""
    share = max(rules.split_evenly(total, hardware.world_size))
    steps = get_key(cfg, "D2SCALE.ACCUMULATION_STEPS", 0)
    largest = hardware.largest_fit(accumulates=steps > 1)
    if not steps and largest is not None and largest < share:
        largest = hardware.largest_fit(accumulates=True)
    if steps > share:
        raise ConfigError([_micro_batches_fault(steps, total, hardware, f"at most {share}")])
    if steps:
        ims_per_gpu = -(-share // steps)
        if largest is not None and ims_per_gpu > largest:
            allowed = f"at least {-(-share // largest)}, for {largest} images fit on a GPU"
            raise ConfigError([_micro_batches_fault(steps, total, hardware, allowed)])
        reason = f"D2SCALE.ACCUMULATION_STEPS = {steps}"
        return _Decision(total, ims_per_gpu, [reason])
    if largest is None:
        return _Decision(
            total,
            share,
            [f"images per GPU {share}: the whole share of a GPU; whether it fits is not known"],
        )
    return _Decision(total, min(share, largest), [_reason_for_largest(hardware, largest)])


def _reason_for_largest(hardware: Hardware, largest: int) -> str:
    if hardware.ims_per_gpu:
        return f"at most {largest} images per GPU, as asked"
    assert hardware.room_gib is not None
    assert hardware.profile is not None
    more = hardware.peak_gib(largest + 1, accumulates=False)
    return (
        f"at most {largest} images per GPU fit in {hardware.room_gib:.2f} GiB, as "
        f"{hardware.profile.source}; {largest + 1} would take {more:.2f} GiB"
    )


def _micro_batches_fault(steps: int, total: int, hardware: Hardware, allowed: str) -> Fault:
    return Fault(
        "D2SCALE.ACCUMULATION_STEPS",
        steps,
        f"{allowed} with {total} images on {hardware.world_size} GPUs",
        "set it to 0 to have it decided",
    )


def _fewer_images_than_gpus(total: int, world_size: int) -> Fault:
    return Fault(
        "SOLVER.IMS_PER_BATCH",
        total,
        f"at least one image for each of {world_size} GPUs",
        "use fewer GPUs, or the method per_gpu or max_memory",
    )


def _nothing_to_fill(hardware: Hardware) -> Fault:
    missing = [
        name
        for name, value in (
            ("the memory of the GPU (--gpu-memory-gib)", hardware.budget_gib),
            ("a memory profile (--profile)", hardware.profile),
        )
        if value is None
    ]
    return Fault(
        "D2SCALE.IMS_PER_GPU",
        0,
        "with max_memory, the images per GPU or what is needed to find them",
        f"give --ims-per-gpu, or {' and '.join(missing)}",
    )


def _split_notes(sizes: Sequence[Sequence[int]]) -> list[str]:
    shares = [sum(rank) for rank in sizes]
    if len(set(shares)) == 1:
        return []
    return [f"uneven split over {len(shares)} GPUs: {', '.join(map(str, shares))} images"]


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
