"""A small training for the memory tests, importable in spawned ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from d2scale.memory.devices import SimulatedDevice
from d2scale.memory.predict import Workload, predict
from d2scale.memory.probe import Measurement, Probe
from d2scale.memory.steps import TrainingStep
from d2scale.memory.worst_case import WorstCase

WORST = WorstCase(((24, 32), (32, 24)), 3, "a test")


class Net(nn.Module):
    """Convolutions with batch norm and dropout: everything that a step can leave a trace in."""

    def __init__(self, fails_at: int = 0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3),
        )  # fmt: skip
        self.fails_at = fails_at

    def forward(self, samples):
        if self.fails_at and len(samples) >= self.fails_at:
            raise ZeroDivisionError("a fault of the model")
        maps = self.body(torch.stack([sample["image"].float() for sample in samples]) + 1)
        return {"loss_cls": maps.square().mean(), "loss_loc": maps.abs().mean()}


def workload(fails_at: int = 0) -> Workload:
    def build_step(device: torch.device) -> TrainingStep:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Net(fails_at).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, foreach=True)
        return TrainingStep(model, optimizer)

    return Workload(build_step, WORST.samples, WORST.trial_batches)


def measure(budget_bytes: int, step: TrainingStep, work: Workload, **options) -> Measurement:
    predicted = predict(workload()).profile(work, caching=False)
    probe = Probe(SimulatedDevice(2 * budget_bytes), step, work.make_batches)
    return probe.measure(predicted, budget_bytes, **options)


def measure_on_ranks(budgets, failing_rank=None):
    """Each rank has its own room and perhaps a fault; the answer of this rank."""
    rank = dist.get_rank()
    work = workload(fails_at=2 if rank == failing_rank else 0)
    step = work.build_step(torch.device("cpu"))
    predicted = predict(workload()).profile(work, caching=False)
    device = SimulatedDevice(max(budgets), context_bytes=max(budgets) - budgets[rank])
    found = Probe(device, step, work.make_batches).measure(predicted, max(budgets))
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return everyone
