"""A small training on a simulated device, on which batch finders are compared.

The device is a CPU whose tensors are counted and refused beyond a budget, with torch's own error.
The model is a narrow MetaFCOS. The images are either equal, or have the sizes and shapes that
multi-scale training gives to a dataset like COCO, batched by aspect ratio as detectron2 does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from d2scale.coco.sizes import aspect_ratio_groups, output_size
from d2scale.config import load_cfg
from d2scale.engine.memory import workload_of
from d2scale.memory.devices import SimulatedDevice
from d2scale.memory.predict import Workload, predict
from d2scale.memory.probe import Probe, measured_profile
from d2scale.memory.worst_case import WorstCase, largest_sizes
from d2scale.planning.memory_profile import MemoryProfile
from d2scale.step.optimizer_step import OptimizerStep
from d2scale.step.out_of_memory import OutOfMemoryError

CPU = torch.device("cpu")
# (height, width, per cent of the images): most are 4:3 or 3:2, few are elongated.
COCO_LIKE = (
    (480, 640, 40),
    (427, 640, 30),
    (640, 480, 18),
    (612, 612, 6),
    (375, 500, 4),
    (360, 640, 2),
)
EQUAL = ((480, 800, 100),)
SHORT_EDGES, MAX_SIZE, IMAGES, BOXES = (96, 112, 128), 213, 200, 8
NARROW = (
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "16", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.FCOS.NUM_CLS_CONVS", "1", "MODEL.FCOS.NUM_BOX_CONVS", "1"),
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "D2SCALE.ON_OOM", "raise"),
)
# Images per GPU, and how many numbers of images were tried.
Choice = tuple[int, int]


class Bench:
    """One training, which any finder can try on a simulated device."""

    def __init__(
        self, images: tuple[tuple[int, int, int], ...], opts: tuple[str, ...] = (), scale: int = 1
    ) -> None:
        edges = tuple(scale * edge for edge in SHORT_EDGES[-1 if len(images) == 1 else 0 :])
        longest = scale * MAX_SIZE
        sizes = ("INPUT.MIN_SIZE_TRAIN", str(edges), "INPUT.MAX_SIZE_TRAIN", str(longest))
        cfg = load_cfg("d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml", [*NARROW, *sizes, *opts])
        shapes = [shape[:2] for shape in images for _ in range(shape[2] * IMAGES // 100)]
        heights, widths = zip(*shapes, strict=True)
        largest = largest_sizes(heights, widths, edges, longest, grouped=True)
        self.worst_case = WorstCase(largest, BOXES, f"{len(heights)} images of a benchmark")
        self.workload: Workload = workload_of(cfg, self.worst_case)
        drawn = random.Random(0)  # noqa: S311 - no secrets
        self.samples = [
            self.worst_case.samples(1, output_size(h, w, drawn.choice(edges), longest))[0]
            for h, w in shapes
        ]
        drawn.shuffle(self.samples)
        self.predicted: MemoryProfile = predict(self.workload).profile(self.workload, caching=False)

    def new_step(self) -> OptimizerStep:
        """A fresh training."""
        torch.manual_seed(0)
        return self.workload.build_step(CPU)

    def fits(self, batches: Sequence[Any], budget_bytes: int) -> bool:
        """Whether a fresh training takes these steps."""
        step = self.new_step()
        with SimulatedDevice(budget_bytes).limited(budget_bytes, step.held_tensors()):
            return all(take(step, batch) for batch in batches)

    def batch_indices(self, size: int) -> list[list[int]]:
        """An epoch in random order, in batches of one aspect-ratio group, the last ones smaller."""
        sides = np.array([sample["image"].shape[1:] for sample in self.samples])
        groups = aspect_ratio_groups(sides[:, 1], sides[:, 0])
        made: list[list[int]] = []
        for group in (0, 1):
            members = np.flatnonzero(groups == group).tolist()
            made += [members[i : i + size] for i in range(0, len(members), size)]
        random.Random(size).shuffle(made)  # noqa: S311 - no secrets
        return made

    def batches(self, size: int) -> list[list[Any]]:
        """The same as samples."""
        return [[self.samples[i] for i in batch] for batch in self.batch_indices(size)]

    def budget_for(self, images: int) -> int:
        """A budget that should hold this many images, and not one more."""
        return round(1.001 * self.predicted.peak_bytes(images + 0.5))

    def most(self, budget_bytes: int, near: int) -> int:
        """The most images whose worst steps train: found by trying, three beyond the last.

        The search begins at ``near``, or below it where that does not train.
        """
        size = max(1, near)
        while size > 1 and not self.fits(self.workload.trial_batches(size), budget_bytes):
            size -= 1
        most = size
        while size < most + 3:
            size += 1
            if self.fits(self.workload.trial_batches(size), budget_bytes):
                most = size
        return most

    def failures(self, size: int, budget_bytes: int) -> int:
        """Steps of an epoch that run out of memory, each after a first that went well."""
        step = self.new_step()
        device, failed = SimulatedDevice(budget_bytes), 0
        take(step, self.samples[:1])  # makes the optimizer's state
        for batch in self.batches(size):
            step.optimizer.zero_grad()
            with device.limited(budget_bytes, step.held_tensors()):
                failed += not take(step, batch)
        return failed


def take(step: OptimizerStep, batch: Any) -> bool:
    """Take a step in one micro-batch; return whether there was memory for it."""
    step.ims_per_gpu = len(batch)
    try:
        step(batch)
    except OutOfMemoryError:
        return False
    return True


def d2scale_probe(bench: Bench, budget_bytes: int) -> Choice:
    """The prediction, then steps with the worst batches."""
    device = SimulatedDevice(budget_bytes)
    probe = Probe(device, bench.new_step(), bench.workload.trial_batches)
    measurement = probe.measure(bench.predicted, budget_bytes, limit=IMAGES)
    profile = measured_profile(bench.predicted, measurement, "")
    return profile.largest_ims_per_gpu(budget_bytes), len(measurement.trials)
