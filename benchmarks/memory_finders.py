"""Batch finders on a simulated device: d2scale's, and those that users have today.

    pip install lightning accelerate
    python benchmarks/memory_finders.py [--budget-mb 58 76]

The device is a CPU whose tensors are counted and refused beyond the budget, with torch's own
error. The model is a narrow MetaFCOS, the images have the sizes and shapes that multi-scale
training gives them. A finder's batch is then trained for an epoch: what runs out of memory there
is a failure. Lightning and accelerate run as they come from the package index; Ultralytics'
automatic batch needs CUDA, so its rule is followed: a line through 1 to 16 images, 60 per cent.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from machine import keep
from tabulate import tabulate
from torch import nn

from d2scale.config import load_cfg
from d2scale.engine.data.transforms import output_size
from d2scale.memory.devices import SimulatedDevice
from d2scale.memory.oom import OutOfMemoryError, is_out_of_memory
from d2scale.memory.predict import Workload, predict
from d2scale.memory.probe import Probe, measured_profile
from d2scale.memory.steps import detector_losses
from d2scale.memory.workload import workload_of
from d2scale.memory.worst_case import WorstCase, worst_case_of_images
from d2scale.sampling import aspect_ratio_groups

CPU = torch.device("cpu")
# (height, width, share of the images): most are 4:3 or 3:2, few are elongated.
SHAPES = (
    (480, 640, 40),
    (427, 640, 30),
    (640, 480, 18),
    (612, 612, 6),
    (375, 500, 4),
    (360, 640, 2),
)
SHORT_EDGES, MAX_SIZE, IMAGES, BOXES = (96, 112, 128), 213, 200, 8
NARROW = (
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.FCOS.NUM_CLS_CONVS", "1", "MODEL.FCOS.NUM_BOX_CONVS", "1"),
    *("INPUT.MIN_SIZE_TRAIN", str(SHORT_EDGES), "INPUT.MAX_SIZE_TRAIN", str(MAX_SIZE)),
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"),
)


class Bench:
    """One training on one simulated device, which counts the sizes that are tried on it."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        cfg = load_cfg("d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml", list(NARROW))
        shapes = [shape[:2] for shape in SHAPES for _ in range(shape[2] * IMAGES // 100)]
        heights, widths = zip(*shapes, strict=True)
        self.worst: WorstCase = worst_case_of_images(cfg, heights, widths, BOXES, "benchmark")
        self.workload: Workload = workload_of(cfg, self.worst)
        drawn = random.Random(0)  # noqa: S311 - no secrets
        self.samples = [
            self.worst.samples(1, output_size(h, w, drawn.choice(SHORT_EDGES), MAX_SIZE))[0]
            for h, w in shapes
        ]
        drawn.shuffle(self.samples)

    def fits(self, batches: list[Any]) -> bool:
        """Whether a fresh training takes these steps."""
        step = self.workload.build_step(CPU)
        with SimulatedDevice(self.budget_bytes).limited(self.budget_bytes, step.held()):
            try:
                for batch in batches:
                    step(batch)
            except OutOfMemoryError:
                return False
        return True

    def batches(self, size: int) -> list[list[Any]]:
        """An epoch, in batches of one aspect-ratio group, as detectron2 makes them."""
        sides = np.array([sample["image"].shape[1:] for sample in self.samples])
        groups = aspect_ratio_groups(sides[:, 1], sides[:, 0])
        made = []
        for group in (0, 1):
            members = [s for s, g in zip(self.samples, groups, strict=True) if g == group]
            made += [members[i : i + size] for i in range(0, len(members), size)]
        return made

    def most(self) -> int:
        """The most images whose worst steps train, by trying all."""
        size = 1
        while self.fits(self.workload.make_batches(size)):  # type: ignore[misc]
            size += 1
        return size - 1

    def failures(self, size: int) -> int:
        """Steps of an epoch that run out of memory."""
        return sum(not self.fits([batch] * 2) for batch in self.batches(size)) if size else 0


def d2scale_probe(bench: Bench) -> tuple[int, int]:
    """Prediction, then worst-case steps."""
    predicted = predict(bench.workload).profile(bench.workload)
    assert bench.workload.make_batches is not None
    probe = Probe(
        SimulatedDevice(bench.budget_bytes),
        bench.workload.build_step(CPU),
        bench.workload.make_batches,
    )
    found = probe.measure(predicted, bench.budget_bytes)
    profile = measured_profile(predicted, found, bench.budget_bytes, "")
    return profile.largest_ims_per_gpu(bench.budget_bytes), len(found.trials)


def accelerate_finder(bench: Bench) -> tuple[int, int]:
    """accelerate's decorator around three steps, from 128 images."""
    from accelerate.utils import find_executable_batch_size

    tried = []

    @find_executable_batch_size(starting_batch_size=128)
    def train(batch_size: int) -> int:
        tried.append(batch_size)
        step = bench.workload.build_step(CPU)
        with SimulatedDevice(bench.budget_bytes).limited(bench.budget_bytes, step.held()):
            for batch in bench.batches(batch_size)[:3]:
                step(batch)
        return batch_size

    return int(train()), len(tried)


def lightning_finder(mode: str) -> Callable[[Bench], tuple[int, int]]:
    """Lightning's batch-size finder, three steps a trial."""

    def find(bench: Bench) -> tuple[int, int]:
        import lightning

        tried = []

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.batch_size = 2
                self.step = bench.workload.build_step(CPU)
                self.model: nn.Module = self.step.model

            def training_step(self, batch: Any, index: int) -> torch.Tensor:
                return torch.stack(list(detector_losses(self.model, batch).values())).sum()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return self.step.optimizer

            def train_dataloader(self) -> Any:
                tried.append(self.batch_size)
                return torch.utils.data.DataLoader(
                    bench.samples,  # type: ignore[arg-type]
                    batch_size=self.batch_size,
                    collate_fn=list,
                )

        module = Module()
        with tempfile.TemporaryDirectory() as folder:
            trainer = lightning.Trainer(
                accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            )  # fmt: skip
            device = SimulatedDevice(bench.budget_bytes)
            with device.limited(bench.budget_bytes, module.step.held()):
                found = lightning.pytorch.tuner.Tuner(trainer).scale_batch_size(module, mode=mode)
        return int(found or 0), len(set(tried))

    return find


def ultralytics_rule(bench: Bench) -> tuple[int, int]:
    """A line through the peaks of 1 to 16 images, filled to 60 per cent."""
    sizes, peaks = [], []
    failed = None
    for size in (1, 2, 4, 8, 16):
        step = bench.workload.build_step(CPU)
        device = SimulatedDevice(bench.budget_bytes)
        try:
            with device.limited(bench.budget_bytes, step.held()):
                step(bench.worst.samples(size))
                sizes.append(size)
                peaks.append(device.peaks()[0])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed = failed or size
    slope, start = np.polyfit(sizes, peaks, deg=1)
    batch = int((0.6 * bench.budget_bytes - start) / slope)
    if failed is not None and batch >= failed:
        batch = max(size for size in sizes if size < failed)
    return batch, len(sizes) + (failed is not None)


FINDERS: dict[str, Callable[[Bench], tuple[int, int]]] = {
    "d2scale": d2scale_probe,
    "accelerate find_executable_batch_size": accelerate_finder,
    "Lightning BatchSizeFinder, power": lightning_finder("power"),
    "Lightning BatchSizeFinder, binsearch": lightning_finder("binsearch"),
    "Ultralytics' rule": ultralytics_rule,
}


def rows(budgets_mb: list[int]) -> Iterator[dict[str, Any]]:
    """Yield one row a finder and budget."""
    for budget in budgets_mb:
        bench = Bench(budget * 10**6)
        most = bench.most()
        for name, find in FINDERS.items():
            torch.manual_seed(0)
            try:
                found, trials = find(bench)
            except ImportError as error:
                print(f"{name} is left out: {error}")
                continue
            yield {
                "key": f"{name}, {budget}",
                "finder": name,
                "budget MB": budget,
                "most that trains": most,
                "chosen": found,
                "of the most %": round(100 * found / most),
                "sizes tried": trials,
                "steps out of memory in an epoch": bench.failures(found),
            }


def main() -> None:
    """Run every finder on every budget, keep the rows, print them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget-mb", type=int, nargs="+", default=[58, 76])
    logging.disable(logging.INFO)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    made = list(rows(parser.parse_args().budget_mb))
    kept = keep("memory_finders", made, "key")
    shown = [{k: v for k, v in row.items() if k not in ("key", "machine")} for row in kept]
    print(tabulate(shown, headers="keys", tablefmt="pipe"))


if __name__ == "__main__":
    main()
