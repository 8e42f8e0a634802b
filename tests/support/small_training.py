"""A small training for the memory tests, importable in spawned ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from d2scale.memory.devices import SimulatedDevice
from d2scale.memory.predict import Workload, predict
from d2scale.memory.probe import Measurement, Probe, measure_workload
from d2scale.memory.worst_case import WorstCase
from d2scale.step import ranks
from d2scale.step.averaging import averaging_bytes
from d2scale.step.optimizer_step import OptimizerStep
from d2scale.step.ranks import gather_objects
from d2scale.step.update import trained_parameters

WORST_CASE = WorstCase(((24, 32), (32, 24)), 3, "a test")


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
    def build_step(device: torch.device) -> OptimizerStep:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Net(fails_at).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, foreach=True)
        return OptimizerStep(model, optimizer, ims_per_gpu=1)

    return Workload(build_step, WORST_CASE.samples, WORST_CASE.trial_batches)


def measure(budget_bytes: int, step: OptimizerStep, work: Workload, **options) -> Measurement:
    predicted = predict(workload()).profile(work, caching=False)
    probe = Probe(SimulatedDevice(2 * budget_bytes), step, work.trial_batches)
    return probe.measure(predicted, budget_bytes, **options)


def measure_on_ranks(budgets, failing_rank=None):
    """Each rank has its own room and perhaps a fault; the answers of all ranks."""
    rank = dist.get_rank()
    device = SimulatedDevice(max(budgets), context_bytes=max(budgets) - budgets[rank])
    fails_at = 2 if rank == failing_rank else 0
    return gather_objects(_measure_here(device, max(budgets), fails_at))


def measure_on_devices_of(budgets):
    """Each rank has a device of its own size."""
    budget_bytes = budgets[dist.get_rank()]
    return gather_objects(_measure_here(SimulatedDevice(budget_bytes), budget_bytes))


def _measure_here(device, budget_bytes, fails_at=0) -> Measurement:
    work = workload(fails_at)
    step = work.build_step(torch.device("cpu"))
    predicted = predict(workload()).profile(workload(), caching=False)
    return Probe(device, step, work.trial_batches).measure(predicted, budget_bytes)


class Boundless(SimulatedDevice):
    """A device that never runs out of memory, but says that it has little."""

    def limited(self, tensor_bytes, held):
        return super().limited(2**40, held)


def profile_where_one_rank_has_room(budget_bytes):
    """The profile of every rank: rank 0 has room for anything, rank 1 not for one image."""
    kind = Boundless if dist.get_rank() == 0 else SimulatedDevice
    device = kind(budget_bytes)
    profile = measure_workload(workload(), device, budget_bytes=budget_bytes, most_images=9)
    return gather_objects(profile)


def averaging_in_a_trial():
    """The bytes that a rank holds before its steps, beyond those of one rank alone."""
    step = workload().build_step(torch.device("cpu"))
    with ranks.alone():
        alone = workload().build_step(torch.device("cpu"))
    held = [sum(t.nbytes for t in built.held_tensors()) for built in (step, alone)]
    parameters = trained_parameters(step.optimizer)
    return held[0] - held[1], averaging_bytes(parameters)


def predict_on_the_first_rank():
    """What one rank predicts while the other does not; the answers of both."""
    prediction = predict(workload()) if dist.get_rank() == 0 else None
    return gather_objects(prediction and prediction.live_bytes(4))
