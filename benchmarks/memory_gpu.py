"""Predictions and choices against a real GPU, for MetaFCOS as published.

    python benchmarks/memory_gpu.py accuracy    # predicted against torch.cuda.max_memory_reserved
    python benchmarks/memory_gpu.py choice      # chosen images against the most that really train
    python benchmarks/memory_gpu.py epoch       # out-of-memory errors over a dataset at the choice
    python benchmarks/memory_gpu.py             # what is kept, and what is open; needs no GPU

``--simulate GIB`` runs the same on a CPU that pretends to be a GPU of that size, to try the
script; nothing is kept then. ``epoch`` reads ``DATASETS.TRAIN`` under ``DETECTRON2_DATASETS``.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, product
from typing import Any

import torch
from machine import RESULTS, keep, table_of

from d2scale.coco.dataset import load_training_dataset
from d2scale.config import load_cfg
from d2scale.engine.data.loader import build_train_loader
from d2scale.engine.memory import workload_of, worst_case_of
from d2scale.memory.devices import CudaDevice, Device, SimulatedDevice
from d2scale.memory.predict import Prediction, Workload, predict
from d2scale.memory.probe import Measurement, Probe
from d2scale.memory.worst_case import assumed_worst_case
from d2scale.planning.memory_profile import GIB
from d2scale.step.agreement import AgreedOutOfMemoryError
from d2scale.step.micro_batches import MicroBatch
from d2scale.step.optimizer_step import OptimizerStep, learning_rates_zero

RECIPE = "d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml"
# A card of 80 GB has a little less than 80 GiB.
BUDGETS_GIB = (8, 16, 24, 40, 72)
Row = dict[str, Any]


# Choices of SOLVER.AMP.ENABLED and D2SCALE.ACTIVATION_CHECKPOINTING, by name.
VARIANTS = {
    ("AMP" if amp else "float32") + (", checkpointing" if checkpointing else ""): (
        *("SOLVER.AMP.ENABLED", str(amp)),
        *("D2SCALE.ACTIVATION_CHECKPOINTING", str(checkpointing)),
    )
    for amp, checkpointing in product((False, True), repeat=2)
}


def variants(opts: Sequence[str], names: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield the recipe in float32 and with AMP, without and with activation checkpointing."""
    for name in names or VARIANTS:
        yield name, load_cfg(RECIPE, [*opts, *VARIANTS[name]])


def take(step: OptimizerStep, batch: MicroBatch) -> bool:
    """Take a step in one micro-batch; return whether there was memory for it."""
    step.ims_per_gpu = len(batch)
    try:
        step.attempt(batch)
    except AgreedOutOfMemoryError:
        step.optimizer.zero_grad()
        return False
    return True


def take_steps(
    device: Device, step: OptimizerStep, batches: Sequence[MicroBatch], tensor_bytes: int
) -> tuple[int, int] | None:
    """Take steps; return (live, reserved) bytes, None if they run out of memory."""
    step.optimizer.zero_grad()
    with learning_rates_zero(step.optimizer), device.limited(tensor_bytes, step.held_tensors()):
        return device.peaks() if all(take(step, batch) for batch in batches) else None


def accuracy(
    device: Device, opts: Sequence[str], names: Sequence[str] = (), most_images: int = 10**6
) -> Iterator[Row]:
    """Compare what is reserved, for images from one to the most that fit."""
    for name, cfg in variants(opts, names):
        workload, prediction = _predicted(cfg)
        step = workload.build_step(device.device)
        images = 1
        while images <= most_images:
            batches = [workload.make_batch(images)] * 3
            peaks = take_steps(device, step, batches, device.total_bytes - device.context_bytes)
            if peaks is None:
                break
            live = prediction.live_bytes(images)
            reserved = prediction.reserved_bytes(images) if device.caches else live
            yield {
                "key": f"{name}, {images}",
                "choice": name,
                "images": images,
                "live GiB": round(peaks[0] / GIB, 3),
                "live error %": _error(live, peaks[0]),
                "reserved GiB": round(peaks[1] / GIB, 3),
                "reserved error %": _error(reserved, peaks[1]),
            }
            images = max(images + 1, round(images * 1.3))


def choice(
    device: Device,
    opts: Sequence[str],
    names: Sequence[str] = (),
    budgets_gib: Sequence[float] = BUDGETS_GIB,
) -> Iterator[Row]:
    """Compare the chosen images with the most that train, for every budget the device has."""
    for name, cfg in variants(opts, names):
        workload, prediction = _predicted(cfg)
        profile = prediction.profile(workload, caching=device.caches)
        step = workload.build_step(device.device)
        for budget in _budgets(device, budgets_gib):
            budget_bytes = int(budget * GIB)
            probe = Probe(device, step, workload.trial_batches)
            measured = probe.measure(profile, budget_bytes)
            most = _most_that_train(device, step, workload, measured)
            yield {
                "key": f"{name}, {budget}",
                "choice": name,
                "budget GiB": budget,
                "predicted": profile.largest_ims_per_gpu(budget_bytes),
                "chosen": measured.largest,
                "trials": len(measured.trials),
                "most": most,
                "chosen / most %": round(100 * measured.largest / most, 1) if most else None,
            }


def epoch(
    device: Device,
    opts: Sequence[str],
    budgets_gib: Sequence[float] = BUDGETS_GIB,
    steps: int | None = None,
) -> Iterator[Row]:
    """Train at the chosen images and count the errors; over an epoch, or as many ``steps``."""
    cfg = load_cfg(RECIPE, opts)
    dataset = load_training_dataset(cfg)
    workload = workload_of(cfg, worst_case_of(cfg, dataset))
    profile = predict(workload).profile(workload, caching=device.caches)
    step = workload.build_step(device.device)
    for budget in _budgets(device, budgets_gib):
        probe = Probe(device, step, workload.trial_batches)
        measured = probe.measure(profile, int(budget * GIB), limit=len(dataset))
        images = measured.largest
        if not images:
            continue
        taken = steps or -(-len(dataset) // images)
        options = {"world_size": 1, "rank": 0, "ims_per_batch": images, "seed": 0}
        loader = build_train_loader(cfg, dataset, **options)
        with loader, learning_rates_zero(step.optimizer):
            batches: Iterable[MicroBatch] = islice(loader, taken)
            if isinstance(device, SimulatedDevice):
                batches = list(batches)  # made inside the limit, they would count
            retries = _allocator_retries(device)
            # One limit around all steps: the allocator's cache goes on from step to step.
            with device.limited(measured.tensor_bytes, step.held_tensors()):
                failed = sum(not take(step, batch) for batch in batches)
                live, reserved = device.peaks()
        yield {
            "key": str(budget),
            "budget GiB": budget,
            "images per GPU": images,
            "steps": taken,
            "out of memory": failed,
            "times the cache was emptied": _allocator_retries(device) - retries,
            "live GiB": round(live / GIB, 3),
            "reserved GiB": round(reserved / GIB, 3),
        }


def _allocator_retries(device: Device) -> int:
    if device.device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device.device).get("num_alloc_retries", 0))


def _predicted(cfg: Any) -> tuple[Workload, Prediction]:
    resized = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN
    worst_case = assumed_worst_case(*resized, grouped=cfg.DATALOADER.ASPECT_RATIO_GROUPING)
    workload = workload_of(cfg, worst_case)
    return workload, predict(workload)


def _budgets(device: Device, budgets_gib: Sequence[float]) -> list[float]:
    if isinstance(device, SimulatedDevice):
        return [device.total_bytes / GIB]
    return [budget for budget in budgets_gib if budget * GIB <= device.total_bytes]


def _most_that_train(
    device: Device, step: OptimizerStep, workload: Workload, measured: Measurement
) -> int:
    """Try every number of images from the chosen one on, to three beyond the last that trains."""
    most, images = 0, max(1, measured.largest)
    while images <= max(most, measured.largest) + 3:
        batches = workload.trial_batches(images)
        if take_steps(device, step, batches, measured.tensor_bytes) is not None:
            most = images
        images += 1
    return most


def _error(predicted: int, measured: int) -> float:
    return round(100 * (predicted / measured - 1), 2)


COMPARISONS: dict[str, Callable[[Device, list[str]], Iterator[Row]]] = {
    "accuracy": accuracy,
    "choice": choice,
    "epoch": epoch,
}


def kept_rows(comparison: str) -> list[Row]:
    """Return what earlier runs on GPUs have left."""
    path = RESULTS / f"memory_gpu_{comparison}.json"
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return rows


def show(comparison: str, rows: list[Row]) -> None:
    """Print a table, or that it is open."""
    if not rows:
        print(f"memory_gpu.py {comparison}: open, for it has not been run on a GPU")
        return
    print(table_of(rows))


def main() -> None:
    """Run one comparison and keep its rows; print what is kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("comparison", nargs="?", choices=COMPARISONS, help="none: print all kept")
    parser.add_argument("--simulate", type=float, metavar="GIB")
    arguments, opts = parser.parse_known_args()
    logging.disable(logging.INFO)
    name = arguments.comparison
    if name is None:
        for comparison in COMPARISONS:
            show(comparison, kept_rows(comparison))
    elif arguments.simulate:
        print("Simulated on a CPU to try the script; nothing is kept:")
        show(name, list(COMPARISONS[name](SimulatedDevice(int(arguments.simulate * GIB)), opts)))
    elif not torch.cuda.is_available():
        parser.error("CUDA is not available; --simulate GIB tries the script without")
    else:
        device = CudaDevice(torch.device("cuda", 0))
        torch.cuda.set_device(device.device)
        show(name, keep(f"memory_gpu_{name}", list(COMPARISONS[name](device, opts)), "key"))


if __name__ == "__main__":
    main()
