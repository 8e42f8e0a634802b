"""The memory that the default engine needs to train a config: predicted, or measured."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch

from d2scale.coco.class_count import with_class_count
from d2scale.coco.dataset import load_training_dataset
from d2scale.coco.records import CocoDataset
from d2scale.engine.data.transforms import input_faults
from d2scale.engine.honoured import value_faults
from d2scale.engine.models import device_of, new_model, precision_of
from d2scale.engine.step import build_step
from d2scale.errors import ConfigError, DataError, Fault
from d2scale.launch.launch import launch
from d2scale.memory.devices import CudaDevice, Device, SimulatedDevice
from d2scale.memory.predict import Workload, predict
from d2scale.memory.probe import measure_workload
from d2scale.memory.worst_case import WorstCase, assumed_worst_case, largest_sizes
from d2scale.planning.coverage import coverage
from d2scale.planning.hardware import FRACTION, Hardware, budget_rule
from d2scale.planning.memory_profile import GIB, MemoryProfile
from d2scale.step.norms import without_synchronised_norms
from d2scale.step.optimizer_step import OptimizerStep
from d2scale.step.precision import bfloat16_faults
from d2scale.step.ranks import world_size


def make_profiles(cfg: Any, device: str, *, explore: bool = False) -> tuple[MemoryProfile, ...]:
    """Return the profiles that ``d2scale memory`` prints: ``cpu`` predicts, ``cuda`` measures.

    ``explore`` predicts the variants of the recipe too; see :func:`predict_variants`. Raises
    ConfigError with all faults of the config or the request.
    """
    faults = [*value_faults(cfg), *input_faults(cfg), *FRACTION.faults(cfg.D2SCALE.MEMORY.FRACTION)]
    budget_gib = cfg.D2SCALE.MEMORY.BUDGET_GIB
    faults += budget_rule(None).faults(budget_gib) if budget_gib else []
    on_device = cfg.clone()
    on_device.defrost()
    on_device.MODEL.DEVICE = device
    faults += [*_device_faults(explore), *bfloat16_faults(on_device)] if device == "cuda" else []
    if faults:
        raise ConfigError(faults)
    if device == "cuda":
        return (measure_profile(on_device),)
    return predict_variants(cfg) if explore else (predict_profile(cfg),)


def _device_faults(explore: bool) -> list[Fault]:
    faults = []
    if explore:
        faults.append(Fault("--explore", True, "with --device cpu", "measure one choice at a time"))
    if not torch.cuda.is_available():
        advice = "use --device cpu, which predicts without a GPU"
        faults.append(Fault("--device", "cuda", "cpu, for CUDA is not available here", advice))
    return faults


def predict_profile(cfg: Any, worst_case: WorstCase | None = None) -> MemoryProfile:
    """Predict the memory of training ``cfg`` on a CUDA device, without one.

    Without ``worst_case`` the batches are the largest of any dataset. Raises ConfigError with
    all faults of the config.
    """
    if faults := [*value_faults(cfg), *input_faults(cfg)]:
        raise ConfigError(faults)
    workload = workload_of(cfg, worst_case or _assumed_worst_case(cfg))
    return predict(workload).profile(workload)


def predict_variants(cfg: Any, worst_case: WorstCase | None = None) -> tuple[MemoryProfile, ...]:
    """Predict the recipe in float32 and with AMP, without and with activation checkpointing."""
    profiles = []
    for amp, checkpointing in product((False, True), repeat=2):
        variant = cfg.clone()
        variant.defrost()
        variant.SOLVER.AMP.ENABLED = amp
        variant.D2SCALE.ACTIVATION_CHECKPOINTING = checkpointing
        profiles.append(predict_profile(variant, worst_case))
    return tuple(profiles)


def measure_profile(cfg: Any) -> MemoryProfile:
    """Measure ``cfg`` on this process's device, or on those of all ranks under torchrun.

    Raises ConfigError as :func:`measure_on_ranks` does, or if one image does not fit, and what the
    model fails with for another reason than memory.
    """
    profile: MemoryProfile = launch(_measure, [cfg], use_cuda=cfg.MODEL.DEVICE == "cuda")
    return profile


def _measure(cfg: Any) -> MemoryProfile:
    profile = measure_on_ranks(cfg)
    budget_gib = _budget_bytes(cfg, _device(cfg)) / GIB
    short_edge = max(cfg.INPUT.MIN_SIZE_TRAIN)
    hardware = Hardware(world_size(), budget_gib, profile, short_edge=short_edge)
    if not hardware.holds_one_image():
        variants = predict_variants(cfg, worst_case_of(cfg, load_training_dataset(cfg)))
        measured = (replace(v, context_bytes=profile.context_bytes) for v in variants)
        replace(hardware, variants=tuple(measured)).largest_fit()
    return profile


def measure_on_ranks(cfg: Any) -> MemoryProfile:
    """Take worst-case training steps on every rank and return what all of them can hold.

    All ranks must call it; all return the same. The batches are made from the training dataset:
    the largest padded size that the augmentation can give its images, each with the most boxes
    that one of them has. A few numbers of images are tried, beginning at the prediction. The
    budget is ``D2SCALE.MEMORY.BUDGET_GIB``, or the smallest device. On a CPU it is simulated. If
    nothing fits, one image of the profile takes more than the budget.

    Raises ConfigError for a budget that cannot be, or a dataset without annotations, and what the
    model fails with for another reason than memory.
    """
    device = _device(cfg)
    budget_bytes = _budget_bytes(cfg, device)
    dataset = load_training_dataset(cfg)
    most_images = min(cfg.D2SCALE.MAX_IMS_PER_BATCH or len(dataset), len(dataset))
    return measure_workload(
        workload_of(cfg, worst_case_of(cfg, dataset)),
        device,
        budget_bytes=budget_bytes,
        most_images=max(1, most_images // world_size()),
    )


def _device(cfg: Any) -> Device:
    device = device_of(cfg)
    if device.type == "cuda":
        return CudaDevice(device)
    return SimulatedDevice(round(cfg.D2SCALE.MEMORY.BUDGET_GIB * GIB))


def _budget_bytes(cfg: Any, device: Device) -> int:
    total_gib = device.total_bytes / GIB
    budget_gib = cfg.D2SCALE.MEMORY.BUDGET_GIB or total_gib
    if faults := budget_rule(total_gib if device.caches else None).faults(budget_gib):
        raise ConfigError(faults)
    return round(budget_gib * GIB)


def worst_case_of(cfg: Any, dataset: CocoDataset) -> WorstCase:
    """Return the largest batches that the augmentation can make of a dataset's images.

    Raises DataError if no image has a box.
    """
    records = dataset.records
    most_boxes = int(records.box_counts.max(initial=0))
    if most_boxes == 0:
        advice = "training would learn nothing: give a dataset with annotations"
        raise DataError([Fault("DATASETS.TRAIN", dataset.name, "images with boxes", advice)])
    sizes = largest_sizes(
        records.heights.tolist(),
        records.widths.tolist(),
        cfg.INPUT.MIN_SIZE_TRAIN,
        cfg.INPUT.MAX_SIZE_TRAIN,
        grouped=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
    )
    return WorstCase(sizes, most_boxes, f"{len(dataset)} images of {dataset.name}")


def _assumed_worst_case(cfg: Any) -> WorstCase:
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if 0 in sizes:
        allowed = "without 0, which keeps the size of the images"
        advice = "give sizes in pixels, or use --device cuda, which looks at the dataset"
        raise ConfigError([Fault("INPUT.MIN_SIZE_TRAIN", tuple(sizes), allowed, advice)])
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    return assumed_worst_case(sizes, cfg.INPUT.MAX_SIZE_TRAIN, grouped=grouped)


def workload_of(cfg: Any, worst_case: WorstCase) -> Workload:
    """Return the training of ``cfg`` on batches of the worst case, to predict or measure.

    The weights are random: their values take no memory.
    """
    cfg = with_class_count(cfg)

    def build(device: torch.device) -> OptimizerStep:
        # A rank that runs out of memory would leave the others waiting in a synchronised norm.
        model = without_synchronised_norms(new_model(cfg), "memory is being measured").train()
        if device.type != "cpu":  # fake parameters cannot be moved
            model.to(device)
        return build_step(cfg, model, ims_per_gpu=1)

    samples, trial_batches = worst_case.samples, worst_case.trial_batches
    return Workload(build, samples, trial_batches, _description(cfg, worst_case), coverage(cfg))


def _description(cfg: Any, worst_case: WorstCase) -> str:
    height, width = worst_case.size
    precision = precision_of(cfg)
    numbers = "float32" if precision is None else f"AMP {str(precision).removeprefix('torch.')}"
    checkpointing = ", activation checkpointing" if cfg.D2SCALE.ACTIVATION_CHECKPOINTING else ""
    return (
        f"{cfg.MODEL.META_ARCHITECTURE}, images of {height}x{width} pixels with "
        f"{worst_case.boxes} boxes ({worst_case.origin}), {numbers}{checkpointing}, "
        f"{cfg.SOLVER.OPTIMIZER}"
    )
