"""Predictions and choices against a real GPU, for MetaFCOS as published.

    python benchmarks/memory_gpu.py accuracy    # predicted against torch.cuda.max_memory_reserved
    python benchmarks/memory_gpu.py choice      # chosen images against the most that really train
    python benchmarks/memory_gpu.py epoch       # out-of-memory errors over a dataset at the choice

``--simulate GIB`` runs the same on a CPU that pretends to be a GPU of that size, to try the
script; nothing is kept then. ``epoch`` reads ``DATASETS.TRAIN`` under ``DETECTRON2_DATASETS``.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import Any

import torch
from machine import keep
from tabulate import tabulate

from d2scale.config import load_cfg
from d2scale.engine.data.coco import load_training_dataset
from d2scale.engine.data.loader import build_train_loader
from d2scale.memory.devices import CudaDevice, Device, SimulatedDevice
from d2scale.memory.oom import is_out_of_memory
from d2scale.memory.predict import Prediction, Workload, predict
from d2scale.memory.preserve import learning_rates_zero
from d2scale.memory.probe import Probe
from d2scale.memory.profile import GIB
from d2scale.memory.steps import TrainingStep
from d2scale.memory.workload import workload_of
from d2scale.memory.worst_case import assumed_worst_case

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
            predicted = prediction.reserved_bytes(images)
            rows.append(
                {
                    "key": f"{name}, {images}",
                    "choice": name,
                    "images": images,
                    "live GiB": round(found[0] / GIB, 3),
                    "live error %": _error(prediction.live_bytes(images), found[0]),
                    "reserved GiB": round(found[1] / GIB, 3),
                    "reserved error %": _error(predicted, found[1]),
                }
            )
            images = max(images + 1, round(images * 1.3))
    return rows


def choice(device: Device, opts: list[str]) -> Rows:
    """Compare the chosen images with the most that train, for every budget the device has."""
    rows = []
    for name, cfg in variants(opts):
        workload, prediction = _predicted(cfg)
        profile = prediction.profile(workload)
        step = workload.build_step(device.device)
        assert workload.make_batches is not None
        for budget in _budgets(device):
            budget_bytes = int(budget * GIB)
            probe = Probe(device, step, workload.make_batches)
            found = probe.measure(profile, budget_bytes)
            most = _most_that_train(device, step, workload.make_batches, found.tensor_bytes)
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
    workload, prediction = _predicted(cfg)
    step = workload.build_step(device.device)
    assert workload.make_batches is not None
    rows = []
    for budget in _budgets(device):
        probe = Probe(device, step, workload.make_batches)
        found = probe.measure(prediction.profile(workload), int(budget * GIB))
        dataset = load_training_dataset(cfg)
        images = min(found.largest, len(dataset))
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
    device: Device, step: TrainingStep, batches: Callable[[int], Any], tensor_bytes: int
) -> int:
    """Try every number of images; beyond the first that fails, three more."""
    most, images = 0, 1
    while images <= most + 3:
        if take_steps(device, step, batches(images), tensor_bytes) is not None:
            most = images
        images += 1
    return most


def _error(predicted: int, found: int) -> float:
    return round(100 * (predicted / found - 1), 2)


def main() -> None:
    """Run one comparison, keep its rows, print all that are kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    comparisons = {"accuracy": accuracy, "choice": choice, "epoch": epoch}
    parser.add_argument("comparison", choices=comparisons)
    parser.add_argument("--simulate", type=float, metavar="GIB")
    arguments, opts = parser.parse_known_args()
    logging.disable(logging.INFO)
    if arguments.simulate:
        rows = comparisons[arguments.comparison](
            SimulatedDevice(int(arguments.simulate * GIB)), opts
        )
    else:
        device = CudaDevice(torch.device("cuda", 0))
        torch.cuda.set_device(device.device)
        made = comparisons[arguments.comparison](device, opts)
        rows = keep(f"memory_gpu_{arguments.comparison}", made, "key")
    shown = [{k: v for k, v in row.items() if k not in ("key", "machine")} for row in rows]
    print(tabulate(shown, headers="keys", tablefmt="pipe"))


if __name__ == "__main__":
    main()
