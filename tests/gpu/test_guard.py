"""Out-of-memory errors of a device that is full, not injected ones: undone, and taken again."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch

from d2scale.memory.tracker import StorageTracker
from d2scale.step.optimizer_step import OptimizerStep
from d2scale.step.out_of_memory import OutOfMemoryError
from devices import on_both_devices
from small_detector import detector_samples, distance, small_detector
from standins import StandIn

PARTS = ("forward", "backward", "optimizer")
# More is not left in a segment that is in use.
_LARGEST_LEFT = 2**25


class FullDevice:
    """A device without a free byte from the beginning of a part of a step, until it is emptied."""

    def __init__(self, device, part):
        self.cuda = device == "cuda"
        self.tracker = None if self.cuda else StorageTracker()
        self.part = part
        self.armed = False
        self.filled = []

    def watching(self):
        return nullcontext() if self.tracker is None else self.tracker

    @contextmanager
    def phase(self, name):
        if self.armed and name == self.part:
            self.armed = False
            self.fill()
        yield

    def fill(self):
        if self.tracker is not None:
            self.tracker.budget_bytes = self.tracker.live_bytes
            return
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        nbytes = _LARGEST_LEFT
        while nbytes >= 512:
            try:
                self.filled.append(torch.empty(nbytes, dtype=torch.uint8, device="cuda"))
            except OutOfMemoryError:
                nbytes //= 2

    def empty(self, *_):
        if self.tracker is not None:
            self.tracker.budget_bytes = None
            return
        self.filled.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()

    def held_bytes(self):
        return torch.cuda.memory_allocated() if self.tracker is None else self.tracker.live_bytes


def train(device, part="", when=-1, emptied_after=1, steps=3):
    """Train; a step finds the device full, until it has failed so often."""
    full, failures = FullDevice(device, part), []
    with full.watching():
        # A detector would take a CPU half a minute.
        model = small_detector(device, torch.float64) if full.cuda else StandIn(torch.float64)
        # Not fused: its temporary tensors and its state need memory in the middle of an update.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
        step = OptimizerStep(model, optimizer, ims_per_gpu=4)
        step.phase = full.phase
        after_failure = step.size.after_failure

        def count(*arguments):
            failures.append(full.part)
            if len(failures) == emptied_after:
                full.empty()
            after_failure(*arguments)

        step.size.after_failure = count
        try:
            for number in range(steps):
                full.armed = number == when
                step(detector_samples(4, side=64))
            optimizer.zero_grad()
            held = full.held_bytes()
        finally:
            full.empty()
    assert len(failures) == (emptied_after if part else 0)
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    return weights, held, step.ims_per_gpu


@pytest.fixture(scope="module")
def undisturbed():
    results = {}
    return lambda device: results.setdefault(device, train(device))


# In the first step there is no state of the optimizer yet. What is empty after the first error has
# room for the same step; otherwise its images are halved.
@on_both_devices
@pytest.mark.parametrize(("when", "emptied_after", "ims_per_gpu"), [(1, 1, 4), (0, 2, 2)])
@pytest.mark.parametrize("part", PARTS)
def test_a_full_device_changes_no_weights_and_keeps_no_memory(
    device, part, when, emptied_after, ims_per_gpu, undisturbed, record_property
):
    weights, held, _ = undisturbed(device)
    found, found_held, found_ims_per_gpu = train(device, part, when, emptied_after)
    assert found_ims_per_gpu == ims_per_gpu
    error = distance(found, weights)
    record_property("relative error of the weights", f"{error:.2g}")
    assert error < 1e-9
    record_property("MiB more than undisturbed", f"{(found_held - held) / 2**20:.2f}")
    assert found_held - held < 2**20
