"""Measuring a config of the default engine on the devices that will train it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from d2scale.coco.dataset import load_training_dataset
from d2scale.engine.launch import launch
from d2scale.engine.memory.predictions import predict_variants
from d2scale.engine.memory.workload import workload_of
from d2scale.engine.models import device_of
from d2scale.errors import ConfigError, Fault
from d2scale.memory.agreement import of_first_rank, ranks
from d2scale.memory.devices import Device, SimulatedDevice, device_at_hand
from d2scale.memory.predict import Workload, predict
from d2scale.memory.probe import Measurement, Probe, measured_profile
from d2scale.memory.worst_case import worst_case_of
from d2scale.planning.hardware import Hardware
from d2scale.planning.memory_profile import GIB, MemoryProfile


def measure_profile(cfg: Any) -> MemoryProfile:
    """Take worst-case training steps on every rank and return what all of them can hold.

    The batches are made from the training dataset: the largest padded size that the augmentation
    can give its images, each with the most boxes that one of them has. At most a few sizes are
    tried, beginning at the prediction. The budget is ``D2SCALE.MEMORY.BUDGET_GIB``, or all of
    the device. On a CPU the budget is simulated.

    Args:
        cfg: as ``d2scale.config.load_cfg`` reads it.

    Raises:
        ConfigError: for a budget that cannot be, a dataset without annotations, or a device
            that is too small for one image.
        Exception: what the model fails with for another reason than memory.
    """
    profile: MemoryProfile = launch(measure_on_rank, [cfg], use_cuda=cfg.MODEL.DEVICE == "cuda")
    return profile


def measure_on_rank(cfg: Any) -> MemoryProfile:
    """Do one rank's part of :func:`measure_profile`; all ranks return the same."""
    device = device_at_hand(device_of(cfg), cfg.D2SCALE.MEMORY.BUDGET_GIB)
    dataset = load_training_dataset(cfg)
    worst = worst_case_of(cfg, dataset.records, dataset.name)
    return measure_workload(
        cfg,
        workload_of(cfg, worst),
        device,
        images=len(dataset),
        variants=lambda: predict_variants(cfg, worst, caching=device.caches),
    )


def measure_workload(
    cfg: Any,
    workload: Workload,
    device: Device,
    *,
    images: int,
    variants: Callable[[], Sequence[MemoryProfile]],
) -> MemoryProfile:
    """Measure any engine's training. Every rank calls it, and all return the same.

    Args:
        cfg: with d2scale's keys and ``INPUT.MIN_SIZE_TRAIN``.
        workload: with batches for trials.
        device: this rank's.
        images: of the dataset.
        variants: predicts other precisions and activation checkpointing, to say what would fit.

    Raises:
        ConfigError: for a budget that cannot be, or a device too small for one image.
    """
    budget_gib = _budget_gib(cfg, device)
    # Where values decide, as in sampling, the ranks may have counted differently.
    predicted = of_first_rank(predict(workload).profile(workload, caching=device.caches))
    most = min(cfg.D2SCALE.MAX_IMS_PER_BATCH or images, images)
    assert workload.make_batches is not None
    probe = Probe(device, workload.build_step(device.device), workload.make_batches)
    found = probe.measure(predicted, round(budget_gib * GIB), limit=max(1, most // ranks()))
    if not found.largest:
        _refuse_too_small(cfg, budget_gib, found, predicted, variants())
    return measured_profile(
        predicted,
        found,
        round(budget_gib * GIB),
        f"{workload.description}; measured on {_name(device)}, {ranks()} ranks, with "
        f"{', '.join(str(trial.ims_per_gpu) for trial in found.trials)} images",
    )


def _refuse_too_small(
    cfg: Any,
    budget_gib: float,
    found: Measurement,
    predicted: MemoryProfile,
    variants: Sequence[MemoryProfile],
) -> None:
    """Say what one image would take, if the prediction agrees that it is too much."""

    def on_device(profile: MemoryProfile) -> MemoryProfile:
        return replace(profile, context_bytes=found.context_bytes)

    Hardware(
        ranks(),
        budget_gib,
        on_device(predicted),
        variants=tuple(map(on_device, variants)),
        short_edge=max(cfg.INPUT.MIN_SIZE_TRAIN),
    ).largest_fit()


def _budget_gib(cfg: Any, device: Device) -> float:
    asked, total_gib = cfg.D2SCALE.MEMORY.BUDGET_GIB, device.total_bytes / GIB
    if asked < 0 or asked > total_gib + 1e-6 or (isinstance(device, SimulatedDevice) and not asked):
        allowed = "above 0 GiB"
        if not isinstance(device, SimulatedDevice):
            allowed = f"0 (all of the device), or up to its {total_gib:.2f} GiB"
        raise ConfigError([Fault("D2SCALE.MEMORY.BUDGET_GIB", asked, allowed, "correct it")])
    return float(asked or total_gib)


def _name(device: Device) -> str:
    if isinstance(device, SimulatedDevice):
        return f"a CPU as a device of {device.total_bytes / GIB:.2f} GiB"
    import torch

    return f"{torch.cuda.get_device_name(device.device)}, {device.total_bytes / GIB:.2f} GiB"
