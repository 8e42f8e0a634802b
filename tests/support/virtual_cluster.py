"""A model with every kind of state, trained by a cluster and by virtual ranks."""

from __future__ import annotations

from collections import deque

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from d2scale.step import ranks
from d2scale.step.optimizer_step import OptimizerStep, StepOptions
from d2scale.step.random_stream import random_stream
from d2scale.step.virtual_ranks import VirtualRanks

IMAGES, SEED = 2, 7  # of a rank of the cluster


class StatefulModel(nn.Module):
    """Batch norm, dropout, a moving normalizer as a number, state that the first forward makes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3))
        self.head = nn.Conv2d(4, 1, 1)
        self.normalizer = 100.0
        self.double()

    def forward(self, samples):
        images = torch.stack([sample["image"] for sample in samples])
        logits = self.head(self.body(images))
        positives = sum(sample["positives"] for sample in samples)
        self.normalizer = 0.9 * self.normalizer + 0.1 * positives
        if not hasattr(self, "forwards"):
            self.forwards = 0
            self.register_buffer("mean", torch.zeros((), dtype=logits.dtype))
        self.forwards += 1
        self.mean += logits.detach().mean()
        noise = torch.rand_like(logits)
        loss = functional.softplus(logits + noise).sum() / self.normalizer
        return {"loss": loss, "square": (logits - self.mean).square().mean() / self.forwards}


class QueueModel(StatefulModel):
    """Keeps state where it cannot be held apart."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: deque[float] = deque(maxlen=3)

    def forward(self, samples):
        self.queue.append(float(samples[0]["positives"]))
        return super().forward(samples)


class LateModel(StatefulModel):
    """Keeps state in a container that its first forward makes."""

    def forward(self, samples):
        if not hasattr(self, "late"):
            self.late: list[float] = []
        self.late.append(float(samples[0]["positives"]))
        return super().forward(samples)


def make_batch(number: int, step_number: int):
    """The images of a rank of the cluster in a step."""
    generator = torch.Generator().manual_seed(1000 * step_number + number)
    draw = {"generator": generator, "dtype": torch.float64}
    return [
        {"image": torch.randn(3, 8, 8, **draw), "positives": 1 + (3 * number + step_number) % 5}
        for _ in range(IMAGES)
    ]


def _optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def _weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def cluster_weights(steps: int):
    """What torch's own data-parallel training makes of the model: one process to a rank."""
    model = StatefulModel()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = _optimizer(model)
    for step_number in range(steps):
        with random_stream(SEED, step_number, ranks.rank()):
            losses = wrapped(make_batch(ranks.rank(), step_number))
            optimizer.zero_grad()
            sum(losses.values()).backward()
        optimizer.step()
    return _weights(model), model.normalizer


def build(count: int, *, ims_per_gpu: int = IMAGES, model=None, **options):
    """The step of a run of virtual ranks on this process's share of them."""
    model = model or StatefulModel()
    virtual = VirtualRanks(model, count, SEED, **options)
    step_options = StepOptions(virtual_ranks=virtual)
    return OptimizerStep(
        model, _optimizer(model), ims_per_gpu=ims_per_gpu, options=step_options
    ), virtual


def take_steps(step, virtual, numbers):
    """Take the steps of the given numbers; return their mean losses."""
    losses = []
    for number in numbers:
        rank_batch = [sample for rank in virtual.own for sample in make_batch(rank, number)]
        losses.append(step(rank_batch, number=number).losses)
    return losses


def virtual_weights(count: int, steps: int, ordered: bool = False):
    """The weights after some steps, with the state of virtual rank 0."""
    step, virtual = build(count, ordered=ordered)
    take_steps(step, virtual, range(steps))
    return _weights(step.model), step.model.normalizer


def resumed_weights(count: int, states, weights, momentum, steps: range):
    """The weights after steps that go on from a checkpoint, on this many ranks."""
    step, virtual = build(count, ordered=True)
    virtual.seed = -1  # the checkpoint's counts
    step.model.load_state_dict(weights, strict=False)
    virtual.load_state_dict(states)
    for parameter, value in zip(step.model.parameters(), momentum, strict=True):
        step.optimizer.state[parameter]["momentum_buffer"] = value.clone()
    take_steps(step, virtual, steps)
    return _weights(step.model), step.model.normalizer


def states_of_ranks(count: int, steps: int):
    """The states of all virtual ranks after some steps, as rank 0 gets them."""
    step, virtual = build(count, ordered=True)
    take_steps(step, virtual, range(steps))
    momentum = [s["momentum_buffer"] for s in step.optimizer.state.values()]
    return virtual.state_dict(), _weights(step.model), momentum
