"""What the tests run in spawned ranks."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2scale.engine.parallel import data_parallel
from d2scale.errors import DataError, Fault
from d2scale.microbatch import MicroBatchStep, StepLosses
from d2scale.rules import micro_batch_sizes
from standins import PlainStandIn, make_samples


def split(samples, rank_sizes):
    """Micro-batches of every rank: consecutive samples, cut to the given sizes."""
    remaining = iter(samples)
    return [[[next(remaining) for _ in range(size)] for size in sizes] for sizes in rank_sizes]


def step_gradients(model, micro_batches, **options) -> tuple[StepLosses, dict]:
    result = MicroBatchStep(model, **options)(micro_batches)
    named = (model.module if isinstance(model, DistributedDataParallel) else model).named_parameters
    return result, {name: p.grad for name, p in named() if p.grad is not None}


def gradients_in_ranks(cases):
    """One (losses, gradients) per case (model class, total, images per GPU)."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = []
    for model_class, total, ims_per_gpu in cases:
        sizes = micro_batch_sizes(total, world_size, ims_per_gpu)
        share = split(make_samples(total), sizes)[rank]
        model = data_parallel(model_class(torch.float64))
        results.append(step_gradients(model, share))
    return results


class Branching(nn.Module):
    """Its second layer is used only by images of an odd id."""

    def __init__(self):
        super().__init__()
        self.inner = PlainStandIn(torch.float64)
        self.odd = nn.Linear(1, 1, dtype=torch.float64)

    def forward(self, samples):
        loss = self.inner(samples)["loss"]
        if any(sample["image_id"] % 2 for sample in samples):
            loss = loss + self.odd(loss.detach().reshape(1)).sum()
        return {"loss": loss}


def unused_parameters():
    """Gradient of a layer that only the first micro-batch of rank 0 uses."""
    torch.manual_seed(0)
    model = data_parallel(Branching(), find_unused_parameters=True)
    samples = make_samples(8)
    odd, even = samples[1::2], samples[::2]
    share = [odd[:2], even[:2]] if dist.get_rank() == 0 else [even[2:]]
    for _ in range(2):
        model.zero_grad()
        _, gradients = step_gradients(model, share)
    mine = gradients["odd.weight"].clone()
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    return bool(mine.abs().sum() > 0) and torch.equal(mine, theirs)


def where_am_i(*args):
    return {
        "args": args,
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "backend": dist.get_backend(),
        "threads": torch.get_num_threads(),
    }


def user_error_on(rank: int):
    if dist.get_rank() == rank:
        raise DataError([Fault("image", "a.jpg", "a readable image", "mend it")])
    dist.barrier()


def program_error():
    raise ZeroDivisionError("a fault of the program")


def killed_on(rank: int):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep_for_ever(marker: str):
    with open(f"{marker}.{dist.get_rank()}", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(1000)
