"""Choose the total batch and the micro-batches of an optimizer step, for every scaling method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from d2scale.config.keys import get_key
from d2scale.config.value_rules import MOST_IMAGES, one_of, whole
from d2scale.errors import ConfigError, Fault
from d2scale.planning import rules
from d2scale.planning.hardware import IMS_PER_GPU, Hardware
from d2scale.planning.schedule import Schedule
from d2scale.planning.sync_bn import (
    SYNC_BN,
    SYNC_BN_RULE,
    choose_sync_bn,
    refuse_sync_bn_without_steps,
)
from d2scale.planning.virtual_ranks import (
    SYNCHRONISED,
    VIRTUAL_RANKS_RULE,
    ModelFacts,
    choose_virtual_ranks,
    refuse_split_share,
    refuse_without_steps,
    virtual_rank_notes,
)

# How a plan's note begins to say that no more images fit, after their number.
FIT_IN = "images per GPU fit in"
_CAP, _STEPS = "D2SCALE.MAX_IMS_PER_BATCH", "D2SCALE.ACCUMULATION_STEPS"
ON_OOM = one_of("D2SCALE.ON_OOM", ("split", "stay_split", "raise"))
BATCH_RULES = (
    whole(_CAP, 0, MOST_IMAGES, advice="set it to 0 for no limit"),
    whole(_STEPS, 0, MOST_IMAGES, advice="set it to 0 to have it decided"),
    VIRTUAL_RANKS_RULE,
    SYNC_BN_RULE,
    ON_OOM,
)


@dataclass(frozen=True)
class Batch:
    """The images of one optimizer step."""

    ims_per_batch: int  # of all ranks
    ims_per_gpu: int  # in the largest micro-batch of any rank
    accumulation_steps: int  # most micro-batches of any rank
    notes: tuple[str, ...]  # the reasons
    virtual_ranks: int = 0  # of a step, each with as many images; 0: none
    sync_bn: bool = False  # batch norm takes its statistics from the images of all GPUs

    def sizes(self) -> dict[str, Any]:
        """Return the numbers by name, without the reasons."""
        return {name: value for name, value in vars(self).items() if name != "notes"}

    @property
    def accumulates(self) -> bool:
        """Whether a step takes several micro-batches."""
        return self.accumulation_steps > 1


def decide_batch(
    cfg: Any, method: str, schedule: Schedule, hardware: Hardware, model: ModelFacts | None = None
) -> Batch:
    """Choose the total batch and the micro-batches for a recipe without faults.

    ``model`` decides on virtual ranks and synchronised batch norm; None: both are left alone, for
    d2scale takes no steps.

    Raises:
        ConfigError: if there is no such batch.
    """
    batch = _CHOOSE[method](cfg, schedule, hardware)
    if model is None:
        refuse_without_steps(cfg)
        refuse_sync_bn_without_steps(get_key(cfg, SYNC_BN, "auto"))
        return batch
    count, notes = choose_virtual_ranks(cfg, method, schedule, hardware.world_size, model)
    if count:
        batch = decide_virtual_batch(count, batch.ims_per_batch, hardware)
    else:
        share = max(rules.split_evenly(batch.ims_per_batch, hardware.world_size))
        refuse_split_share(cfg, model, batch.ims_per_gpu, share)
    sizes = rules.micro_batch_sizes(batch.ims_per_batch, hardware.world_size, batch.ims_per_gpu)
    sync_bn, reasons = choose_sync_bn(
        get_key(cfg, SYNC_BN, "auto"),
        sizes,
        recipe_has_it=model.obstacle == SYNCHRONISED,
        trains_batch_norm=model.batch_norm,
        virtual_ranks=count,
    )
    return replace(batch, notes=(*batch.notes, *notes, *reasons), sync_bn=sync_bn)


def decide_virtual_batch(count: int, total: int, hardware: Hardware) -> Batch:
    """Divide ``total`` images over ``count`` virtual ranks, each a micro-batch if it fits.

    Raises:
        ConfigError: if not even one image fits.
    """
    images = total // count
    largest = hardware.largest_fit(accumulates=count > hardware.world_size)
    micro_batches = -(-images // min(largest or images, images))
    ims_per_gpu = -(-images // micro_batches)
    turns = max(rules.split_evenly(count, hardware.world_size))
    notes = [*virtual_rank_notes(count, hardware.world_size, total, ims_per_gpu, largest)]
    if largest is None:
        notes.append(f"images per GPU {images}: a virtual rank's; whether they fit is not known")
    else:
        notes.append(_reason_for_largest(hardware, largest))
    return Batch(total, ims_per_gpu, turns * micro_batches, tuple(notes), count)


def _batch(total: int, ims_per_gpu: int, hardware: Hardware, notes: Sequence[str]) -> Batch:
    """Divide ``total`` images over ranks and micro-batches of at most ``ims_per_gpu``."""
    sizes = rules.micro_batch_sizes(total, hardware.world_size, ims_per_gpu)
    of_ranks = [sum(rank) for rank in sizes]
    if len(set(of_ranks)) > 1:
        images = ", ".join(map(str, of_ranks))
        notes = [*notes, f"uneven split over {len(of_ranks)} GPUs: {images} images"]
    return Batch(total, max(map(max, sizes)), max(map(len, sizes)), tuple(notes))


def _keep_total(cfg: Any, schedule: Schedule, hardware: Hardware) -> Batch:
    total = schedule.ims_per_batch
    if total < hardware.world_size:
        advice = "use fewer GPUs, or the method per_gpu or max_memory"
        raise ConfigError([_below_gpus("SOLVER.IMS_PER_BATCH", total, hardware, advice)])
    return _fit_total(cfg, total, hardware)


def _per_gpu(cfg: Any, schedule: Schedule, hardware: Hardware) -> Batch:
    exact = Fraction(hardware.world_size * schedule.ims_per_batch, schedule.reference_world_size)
    total = max(hardware.world_size, round(exact))
    batch = _fit_total(cfg, total, hardware)
    if total == exact:
        return batch
    note = (
        f"{schedule.ims_per_batch} images on {schedule.reference_world_size} GPUs are "
        f"{float(exact):.2f} on {hardware.world_size}, rounded to {total}"
    )
    return replace(batch, notes=(*batch.notes, note))


def _max_memory(cfg: Any, schedule: Schedule, hardware: Hardware) -> Batch:
    steps = get_key(cfg, _STEPS, 0)
    largest = hardware.largest_fit(accumulates=steps > 1)
    if largest is None:
        allowed = "with max_memory, the images per GPU or what is needed to find them"
        advice = f"set it, or {' and '.join(hardware.unknown)}"
        raise ConfigError([Fault(IMS_PER_GPU, 0, allowed, advice)])
    notes = [_reason_for_largest(hardware, largest)]
    total = hardware.world_size * largest * (steps or 1)
    cap = get_key(cfg, _CAP, 0)
    if not cap or total <= cap:
        return _batch(total, largest, hardware, notes)
    if cap < hardware.world_size:
        raise ConfigError([_below_gpus(_CAP, cap, hardware, "raise it or use fewer GPUs")])
    notes.append(f"total batch {total} cut to {_CAP} = {cap}")
    if steps:
        largest = _images_for_steps(steps, cap, hardware.world_size, largest)
    return _batch(cap, largest, hardware, notes)


_CHOOSE = {"per_gpu": _per_gpu, "keep_total": _keep_total, "max_memory": _max_memory}


def _fit_total(cfg: Any, total: int, hardware: Hardware) -> Batch:
    """Cut a given total batch into micro-batches: one for each rank, if it fits."""
    images = max(rules.split_evenly(total, hardware.world_size))
    steps = get_key(cfg, _STEPS, 0)
    largest = hardware.largest_fit(accumulates=steps > 1)
    if steps:
        ims_per_gpu = _images_for_steps(steps, total, hardware.world_size, largest)
        return _batch(total, ims_per_gpu, hardware, [f"{_STEPS} = {steps}"])
    if largest is not None and largest < images:
        largest = hardware.largest_fit(accumulates=True)
    if largest is None:
        note = f"images per GPU {images}: all that a GPU has; whether they fit is not known"
        return _batch(total, images, hardware, [note])
    return _batch(total, largest, hardware, [_reason_for_largest(hardware, largest)])


def _images_for_steps(steps: int, total: int, world_size: int, largest: int | None) -> int:
    """Return the images per GPU with which a step has exactly ``steps`` micro-batches.

    ``largest`` is the most images per GPU that fit, None if that is not known.

    Raises:
        ConfigError: if a step cannot be cut into that many.
    """
    images = max(rules.split_evenly(total, world_size))
    possible = rules.micro_batch_counts(images, largest or images)
    if steps in possible:
        return -(-images // steps)
    fewer = [count for count in possible if count < steps]
    more = [count for count in possible if count > steps]
    if not more:
        allowed = f"at most {images}"
    elif not fewer:
        allowed = f"at least {more[0]}, for {largest} images fit on a GPU,"
    else:
        allowed = f"{fewer[-1]} or {more[0]}"
    allowed += f" with {total} images on {world_size} GPUs"
    raise ConfigError([Fault(_STEPS, steps, allowed, "set it to 0 to have it decided")])


def _reason_for_largest(hardware: Hardware, largest: int) -> str:
    if hardware.ims_per_gpu:
        return f"at most {largest} images per GPU, as asked"
    assert hardware.room_gib is not None
    assert hardware.profile is not None
    more = hardware.peak_gib(largest + 1, accumulates=False)
    return (
        f"at most {largest} {FIT_IN} {hardware.room_gib:.2f} GiB, as "
        f"{hardware.profile.source}; {largest + 1} would take {more:.2f} GiB"
    )


def _below_gpus(key: str, total: int, hardware: Hardware, advice: str) -> Fault:
    return Fault(key, total, f"at least one image for each of {hardware.world_size} GPUs", advice)
