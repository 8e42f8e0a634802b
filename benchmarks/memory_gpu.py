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
from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import Any

import torch
from machine import RESULTS, keep
from tabulate import tabulate

from d2scale.coco.dataset import load_training_dataset
from d2scale.config import load_cfg
from d2scale.engine.data.loader import build_train_loader
from d2scale.engine.memory.workload import workload_of
from d2scale.memory.devices import CudaDevice, Device, SimulatedDevice
from d2scale.memory.predict import Prediction, Workload, predict
from d2scale.memory.preserve import learning_rates_zero
from d2scale.memory.probe import Measurement, Probe
from d2scale.memory.steps import TrainingStep
from d2scale.memory.worst_case import assumed_worst_case, worst_case_of
from d2scale.planning.memory_profile import GIB
from d2scale.step.out_of_memory import is_out_of_memory

RECIPE = "d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml"
BUDGETS_GIB = (8, 16, 24, 40, 80)
Rows = list[dict[str, Any]]


def variants(opts: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the recipe in float32 and with AMP, without and with activation checkpointing."""
    for amp, checkpointing in product((False, True), repeat=2):
        switches = ["SOLVER.AMP.ENABLED", str(amp)]
        switches += ["D2SCALE.ACTIVATION_CHECKPOINTING", str(checkpointing)]
        name = ("AMP" if amp else "float32") + (", checkpointing" if checkpointing else "")
        yield name, load_cfg(RECIPE, [*opts, *switches])


def take_steps(
    device: Device, step: TrainingStep, batches: list[Any], tensor_bytes: int
) -> tuple[int, int] | None:
    """Take steps; return (live, reserved) bytes, None if they run out of memory."""
    with device.limited(tensor_bytes, step.held()), learning_rates_zero(step.optimizer):
        try:
            for batch in batches:
                step(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        return device.peaks()


def accuracy(device: Device, opts: list[str]) -> Rows:
    """Compare what is reserved, for images from one to the most that fit."""
    rows = []
    for name, cfg in variants(opts):
        workload, prediction = _predicted(cfg)
        step = workload.build_step(device.device)
        images = 1
        while True:
            batches = [workload.make_batch(images)] * 3
            found = take_steps(device, step, batches, device.total_bytes - device.context_bytes)
            if found is None:
                break
            live = prediction.live_bytes(images)
            reserved = prediction.reserved_bytes(images) if device.caches else live
            rows.append(
                {
                    "key": f"{name}, {images}",
                    "choice": name,
                    "images": images,
                    "live GiB": round(found[0] / GIB, 3),
                    "live error %": _error(live, found[0]),
                    "reserved GiB": round(found[1] / GIB, 3),
                    "reserved error %": _error(reserved, found[1]),
                }
            )
            images = max(images + 1, round(images * 1.3))
    return rows


def choice(device: Device, opts: list[str]) -> Rows:
    """Compare the chosen images with the most that train, for every budget the device has."""
    rows = []
    for name, cfg in variants(opts):
        workload, prediction = _predicted(cfg)
        profile = prediction.profile(workload, caching=device.caches)
        step = workload.build_step(device.device)
        assert workload.make_batches is not None
        for budget in _budgets(device):
            budget_bytes = int(budget * GIB)
            probe = Probe(device, step, workload.make_batches)
            found = probe.measure(profile, budget_bytes)
            most = _most_that_train(device, step, workload.make_batches, found)
            rows.append(
                {
                    "key": f"{name}, {budget}",
                    "choice": name,
                    "budget GiB": budget,
                    "predicted": profile.largest_ims_per_gpu(budget_bytes),
                    "chosen": found.largest,
                    "trials": len(found.trials),
                    "most": most,
                    "chosen / most %": round(100 * found.largest / most, 1) if most else None,
                }
            )
    return rows


def epoch(device: Device, opts: list[str]) -> Rows:
    """Train an epoch over the recipe's dataset at the chosen images and count the errors."""
    cfg = load_cfg(RECIPE, opts)
    dataset = load_training_dataset(cfg)
    workload = workload_of(cfg, worst_case_of(cfg, dataset.records, dataset.name))
    profile = predict(workload).profile(workload, caching=device.caches)
    step = workload.build_step(device.device)
    assert workload.make_batches is not None
    rows = []
    for budget in _budgets(device):
        probe = Probe(device, step, workload.make_batches)
        found = probe.measure(profile, int(budget * GIB), limit=len(dataset))
        images = found.largest
        if not images:
            continue
        loader = build_train_loader(
            cfg, dataset, world_size=1, rank=0, ims_per_batch=images, seed=0
        )
        with loader:
            steps = -(-len(dataset) // images)
            batches = list(islice(loader, steps))
        failed = sum(
            take_steps(device, step, [batch], found.tensor_bytes) is None for batch in batches
        )
        rows.append(
            {
                "key": str(budget),
                "budget GiB": budget,
                "images per GPU": images,
                "steps": steps,
                "out of memory": failed,
            }
        )
    return rows


def _predicted(cfg: Any) -> tuple[Workload, Prediction]:
    workload = workload_of(cfg, assumed_worst_case(cfg))
    return workload, predict(workload)


def _budgets(device: Device) -> list[float]:
    if isinstance(device, SimulatedDevice):
        return [device.total_bytes / GIB]
    return [budget for budget in BUDGETS_GIB if budget * GIB <= device.total_bytes]


def _most_that_train(
    device: Device, step: TrainingStep, batches: Callable[[int], Any], found: Measurement
) -> int:
    """Try every number of images from the chosen one on, to three beyond the last that trains."""
    most, images = 0, max(1, found.largest)
    while images <= max(most, found.largest) + 3:
        if take_steps(device, step, batches(images), found.tensor_bytes) is not None:
            most = images
        images += 1
    return most


def _error(predicted: int, found: int) -> float:
    return round(100 * (predicted / found - 1), 2)


COMPARISONS = {"accuracy": accuracy, "choice": choice, "epoch": epoch}


def kept_rows(comparison: str) -> Rows:
    """Return what earlier runs on GPUs have left."""
    path = RESULTS / f"memory_gpu_{comparison}.json"
    rows: Rows = json.loads(path.read_text()) if path.exists() else []
    return rows


def show(comparison: str, rows: Rows) -> None:
    """Print a table, or that it is open."""
    if not rows:
        print(f"memory_gpu.py {comparison}: open, for it has not been run on a GPU")
        return
    shown = [{k: v for k, v in row.items() if k not in ("key", "machine")} for row in rows]
    print(tabulate(shown, headers="keys", tablefmt="pipe"))


def main() -> None:
    """Run one comparison and keep its rows; print what is kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("comparison", nargs="?", choices=COMPARISONS, help="none: print all kept")
    parser.add_argument("--simulate", type=float, metavar="GIB")
    arguments, opts = parser.parse_known_args()
    logging.disable(logging.INFO)
    name = arguments.comparison
    if name is None:
        for each in COMPARISONS:
            show(each, kept_rows(each))
    elif arguments.simulate:
        print("Simulated on a CPU to try the script; nothing is kept:")
        show(name, COMPARISONS[name](SimulatedDevice(int(arguments.simulate * GIB)), opts))
    elif not torch.cuda.is_available():
        parser.error("CUDA is not available; --simulate GIB tries the script without")
    else:
        device = CudaDevice(torch.device("cuda", 0))
        torch.cuda.set_device(device.device)
        show(name, keep(f"memory_gpu_{name}", COMPARISONS[name](device, opts), "key"))


if __name__ == "__main__":
    main()
