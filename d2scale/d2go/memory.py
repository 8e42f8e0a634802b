"""The memory of a d2go training: its own model, optimizer and worst-case batches."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from d2go.modeling.api import build_d2go_model
from d2go.optimizer.build import build_optimizer_mapper
from detectron2.data import get_detection_dataset_dicts
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.amp.grad_scaler import GradScaler

from d2scale.errors import DataError, Fault
from d2scale.memory.devices import CudaDevice
from d2scale.memory.predict import Workload, predict
from d2scale.memory.probe import measure_workload
from d2scale.memory.worst_case import Size, WorstCase, largest_sizes
from d2scale.planning.coverage import coverage
from d2scale.planning.hardware import Hardware
from d2scale.planning.memory_profile import GIB, MemoryProfile
from d2scale.planning.plan import Plan, refuse_more_than_all
from d2scale.step.micro_batches import MicroBatch, StepLosses
from d2scale.step.norms import without_synchronised_norms
from d2scale.step.optimizer_step import BeforeUpdate, OptimizerStep, StepOptions
from d2scale.step.ranks import broadcast_object, world_size

ENGINE = "d2go"


def check_memory(cfg: Any) -> None:
    """Refuse a budget or a profile that no number of ranks could be planned with.

    Raises:
        ConfigError: with all faults.
    """
    Hardware.from_cfg(cfg, 1, device_gib=_device_gib(cfg), engine=ENGINE)


def hardware_for_training(cfg: Any, world_size: int, method: str) -> Hardware:
    """Return the hardware to plan for; the method that fills the memory learns how much fits.

    Raises:
        ConfigError: for a budget that cannot be, or what :func:`memory_profile` raises.
    """
    return Hardware.for_training(
        cfg,
        world_size,
        method=method,
        device_gib=_device_gib(cfg),
        engine=ENGINE,
        make_profile=lambda: memory_profile(cfg),
        make_variants=lambda: _alternatives(cfg),
    )


def _alternatives(cfg: Any) -> tuple[MemoryProfile, ...]:
    """The recipe in float32 and with AMP, predicted."""
    worst, _ = _worst_case(cfg)
    profiles = []
    for amp in (False, True):
        changed = cfg.clone()
        changed.defrost()
        changed.SOLVER.AMP.ENABLED = amp
        profiles.append(_predicted(workload_of(changed, worst)))
    return tuple(profiles)


def memory_profile(cfg: Any) -> MemoryProfile:
    """Tell the memory of training ``cfg``, on every rank of a launched d2go run.

    Measured where the model trains on a GPU and ``D2SCALE.MEMORY.PROBE`` is set, otherwise
    predicted: with fake tensors, or with real steps on the CPU if the model needs values.

    Raises:
        ConfigError: for a dataset without annotations, or a GPU too small for one image.
    """
    worst, images = _worst_case(cfg)
    workload = workload_of(cfg, worst)
    if not (_on_cuda(cfg) and cfg.D2SCALE.MEMORY.PROBE):
        return _predicted(workload)
    device = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    most_images = min(cfg.D2SCALE.MAX_IMS_PER_BATCH or images, images)
    return measure_workload(
        workload,
        device,
        budget_bytes=round(cfg.D2SCALE.MEMORY.BUDGET_GIB * GIB) or device.total_bytes,
        most_images=max(1, most_images // world_size()),
    )


def _predicted(workload: Workload) -> MemoryProfile:
    # Where values decide, as in sampling, the ranks may have counted differently.
    return broadcast_object(predict(workload).profile(workload))


def workload_of(cfg: Any, worst: WorstCase) -> Workload:
    """Return what d2go does with ``cfg``, on batches of the worst case, with random weights."""

    def build_step(device: torch.device) -> OptimizerStep:
        own = cfg.clone()
        own.defrost()
        own.MODEL.DEVICE = str(device)
        # A rank that runs out of memory would leave the others waiting in a synchronised norm.
        built = build_d2go_model(own).model.train()
        model = without_synchronised_norms(built, "memory is being measured")
        half = cfg.SOLVER.AMP.ENABLED
        options = StepOptions(
            precision=torch.float16 if half else None,
            scaler=GradScaler("cuda") if half and device.type == "cuda" else None,
        )
        return _Trial(model, build_optimizer_mapper(own, model), ims_per_gpu=1, options=options)

    height, width = worst.size
    numbers = "AMP float16" if cfg.SOLVER.AMP.ENABLED else "float32"
    return Workload(
        build_step,
        lambda count: _batch(worst, count, worst.size),
        lambda count: [_batch(worst, count, size) for size in worst.trial_sizes],
        f"{cfg.MODEL.META_ARCHITECTURE} in d2go, images of {height}x{width} pixels with "
        f"{worst.boxes} boxes ({worst.origin}), {numbers}, {cfg.SOLVER.OPTIMIZER}",
        coverage(cfg, engine=ENGINE),
    )


class _Trial(OptimizerStep):
    """A step with the storage of events that detectron2's models write to."""

    def attempt(
        self, rank_batch: MicroBatch, before_update: BeforeUpdate | None = None
    ) -> StepLosses:
        with EventStorage():
            return super().attempt(rank_batch, before_update)


def _batch(worst: WorstCase, count: int, size: Size) -> list[dict[str, Any]]:
    """detectron2's form of the worst samples."""
    samples = worst.samples(count, size)
    for sample in samples:
        boxes, classes = Boxes(sample.pop("boxes")), sample.pop("classes")
        sample["instances"] = Instances(size, gt_boxes=boxes, gt_classes=classes)
    return samples


def refuse_more_than_images(plan: Plan, cfg: Any) -> None:
    """Refuse a total batch that was decided here, to fill the memory, and exceeds the dataset.

    Raises:
        DataError: if there are fewer images.
    """
    if plan.method == "max_memory" and not cfg.D2SCALE.IMS_PER_GPU:
        refuse_more_than_all(plan, len(_images(cfg)[0]))


def _worst_case(cfg: Any) -> tuple[WorstCase, int]:
    """The worst case, and how many images there are."""
    heights, widths, most_boxes = _images(cfg)
    names = ",".join(cfg.DATASETS.TRAIN)
    if most_boxes == 0:
        advice = "training would learn nothing: give a dataset with annotations"
        raise DataError([Fault("DATASETS.TRAIN", names, "images with boxes", advice)])
    sizes = largest_sizes(
        heights,
        widths,
        cfg.INPUT.MIN_SIZE_TRAIN,
        cfg.INPUT.MAX_SIZE_TRAIN,
        grouped=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
    )
    return WorstCase(sizes, most_boxes, f"{len(heights)} images of {names}"), len(heights)


def _images(cfg: Any) -> tuple[list[int], list[int], int]:
    return _read_images(tuple(cfg.DATASETS.TRAIN), cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)


@lru_cache(maxsize=1)  # reading COCO takes a while
def _read_images(names: tuple[str, ...], filter_empty: bool) -> tuple[list[int], list[int], int]:
    """Heights and widths of all training images, and the most boxes that one has."""
    entries = get_detection_dataset_dicts(list(names), filter_empty=filter_empty)
    return (
        [entry["height"] for entry in entries],
        [entry["width"] for entry in entries],
        max((len(entry.get("annotations", ())) for entry in entries), default=0),
    )


def _device_gib(cfg: Any) -> float | None:
    """The memory of this rank's GPU, None on a CPU."""
    if not _on_cuda(cfg):
        return None
    return CudaDevice(torch.device("cuda", torch.cuda.current_device())).total_bytes / GIB


def _on_cuda(cfg: Any) -> bool:
    return cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available()
