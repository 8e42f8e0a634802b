"""What the tests run in spawned ranks."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from d2scale.engine.data.sampling import rank_slice
from d2scale.errors import DataError, Fault
from d2scale.launch import rank_watch
from d2scale.planning.rules import micro_batch_sizes
from d2scale.step import agreement, guard
from d2scale.step.averaging import GradientAverager
from d2scale.step.forward_backward import ForwardBackward
from d2scale.step.guard import StepDoesNotFitError
from d2scale.step.micro_batches import StepLosses
from d2scale.step.optimizer_step import OptimizerStep, StepOptions
from d2scale.step.ranks import (
    alone,
    broadcast_model,
    broadcast_object,
    gather_objects,
    largest_over_ranks,
    rank,
    refuse_differences,
    same_on_all_ranks,
    sum_on_host,
    world_size,
)
from standins import (
    FailingOptimizer,
    FailingStandIn,
    PlainStandIn,
    StandIn,
    make_samples,
    out_of_memory,
)


def split(samples, rank_sizes):
    """Micro-batches of every rank: consecutive samples, cut to the given sizes."""
    remaining = iter(samples)
    return [[[next(remaining) for _ in range(size)] for size in sizes] for sizes in rank_sizes]


def forward_backward(model, **options):
    """A function of micro-batches, without virtual ranks."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    step = ForwardBackward(model, GradientAverager(parameters), **options)
    return lambda micro_batches, **k: step([(None, batch) for batch in micro_batches], **k)


def step_gradients(model, micro_batches, **options) -> tuple[StepLosses, dict]:
    result = forward_backward(model, **options)(micro_batches)
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradients_in_ranks(cases):
    """One (losses, gradients) per case (model class, total, images per GPU)."""
    results = []
    for model_class, total, ims_per_gpu in cases:
        sizes = micro_batch_sizes(total, world_size(), ims_per_gpu)
        share = split(make_samples(total), sizes)[rank()]
        results.append(step_gradients(model_class(torch.float64), share))
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
    model = Branching()
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


def user_error_on(failing: int):
    if dist.get_rank() == failing:
        raise DataError([Fault("image", "a.jpg", "a readable image", "mend it")])
    dist.barrier()


def program_error():
    raise ZeroDivisionError("a fault of the program")


def killed_on(failing: int):
    if dist.get_rank() == failing:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def stopped_on(stopping: int, marker: str):
    """The others wait, and their watch tells of it early."""
    rank_watch._TOLD_AFTER_SECONDS = 1.5
    gather_objects(None)
    if rank() == stopping:
        with open(f"{marker}.{stopping}", "w") as file:
            file.write(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    gather_objects(None)


def sleep_for_ever(marker: str):
    with open(f"{marker}.{dist.get_rank()}", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(1000)


def guarded_training(cases, ims_per_batch=6, ims_per_gpu=4, steps=3):
    """Train a few steps for each case (part, ranks that fail, step, how often), describe the end.

    A rank fails in its first attempts of the step; a case of None never fails.
    """
    return [_guarded(case, ims_per_batch, ims_per_gpu, steps) for case in cases]


def _guarded(case, ims_per_batch, ims_per_gpu, steps):
    torch.manual_seed(0)
    failures = []
    now = {"step": -1}
    part, ranks, when, often = case or ("", (), -1, 0)

    def fail(asked, images=0):
        if asked != part or rank() not in ranks or now["step"] != when or len(failures) == often:
            return False
        failures.append(images)
        return True

    model = FailingStandIn(torch.float64)
    model.fail = fail
    optimizer = FailingOptimizer(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.fail = lambda: fail("optimizer")
    split_to = []
    take_step = OptimizerStep(model, optimizer, ims_per_gpu=ims_per_gpu)
    take_step.on_new_size = split_to.append
    remember = take_step._undo.remember

    def remember_or_fail():
        if fail("undo"):
            raise out_of_memory()
        remember()

    take_step._undo.remember = remember_or_fail
    losses, drawn = [], []
    for step in range(steps):
        now["step"] = step
        samples = make_samples(ims_per_batch, seed=step)
        share = samples[rank_slice(ims_per_batch, world_size(), rank())]
        losses.append(take_step(share).losses)
        drawn.append(torch.rand(()).item())
    momentum = {
        name: optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in model.named_parameters()
    }
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "momentum": momentum,
        "moving": model.moving.item(),
        "losses": losses,
        "drawn": drawn,
        "split_to": split_to,
        "failures": len(failures),
    }


def growing_training(cases):
    """Train 4 images a rank for each case: what D2SCALE.ON_OOM is, and from which step 4 fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "_GROW_AFTER", 3)
        return [_growing(*case) for case in cases]


def _growing(on_oom, fits_from):
    now, failed, new, sizes = {"step": 0}, [], [], []

    def fail(part, images):
        # The last rank's loss normalizers are the first to need memory.
        fails = part == "normalizers" and images > 2 and now["step"] < fits_from
        failed.extend([now["step"]] * fails)
        return fails and rank() == world_size() - 1

    model = FailingStandIn(torch.float64)
    model.fail = fail
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = OptimizerStep(model, optimizer, ims_per_gpu=4, options=StepOptions(on_oom=on_oom))
    step.on_new_size = new.append
    for now["step"] in range(14):
        step(make_samples(4 * world_size(), seed=now["step"])[4 * rank() :][:4])
        sizes.append(step.ims_per_gpu)
    assert same_on_all_ranks(sizes)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return {"weights": weights, "failed": failed, "new": new, "sizes": sizes}


def one_image_does_not_fit():
    """The error and the weights, before and after, of a step that never fits on the last rank."""
    model = FailingStandIn(torch.float64)
    optimizer = FailingOptimizer(model.parameters(), lr=0.05, momentum=0.9)
    take_step = OptimizerStep(model, optimizer, ims_per_gpu=4)
    share = make_samples(4)[rank_slice(4, world_size(), rank())]
    take_step(share)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.fail = lambda: rank() == world_size() - 1
    try:
        take_step(share)
    except StepDoesNotFitError as error:
        same = all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        return str(error), same, take_step.ims_per_gpu
    return None


def other_error_on_the_last_rank():
    model = FailingStandIn()
    optimizer = FailingOptimizer(model.parameters(), lr=0.05)
    take_step = OptimizerStep(model, optimizer, ims_per_gpu=4)

    def finish(_):
        if rank() == world_size() - 1:
            raise ZeroDivisionError("a fault of the program")

    take_step(make_samples(4)[rank_slice(4, world_size(), rank())], finish)


def other_error_on_a_slow_rank():
    """The same on a busy machine: the rank that fails takes a while to end."""
    try:
        other_error_on_the_last_rank()
    except ZeroDivisionError:
        time.sleep(4.0)
        raise


def other_error_in_backward_of_the_last_rank():
    """The kinds of error that the ranks end a step with."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ZeroDivisionError("a fault of the program")

    class Model(StandIn):
        def forward(self, samples, normalizers=None):
            losses = super().forward(samples, normalizers)
            if rank() == world_size() - 1:
                losses["loss_cls"] = Broken.apply(losses["loss_cls"])
            return losses

    model = Model()
    step = OptimizerStep(model, torch.optim.SGD(model.parameters(), lr=0.1), ims_per_gpu=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "_ECHO_SECONDS", 0.0)  # no rank ends here
        try:
            step.attempt(make_samples(2))
        except Exception as error:
            return gather_objects(type(error).__name__)


def exchanges_alone():
    """What a rank exchanges, while it is alone and afterwards."""
    with alone():
        own = (rank(), world_size(), gather_objects(rank()))
    return own, gather_objects(rank())


def averaged_gradients():
    """Gradients that not all ranks have, averaged: (for all, for rank 0 alone, for none)."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 2, 1)]
    averager = GradientAverager(parameters)
    used = parameters[:2] if rank() == 0 else parameters[:1]
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        with averager.taking_part(joins=True), averager.last_backward():
            (sum((p * (rank() + 1)).sum() for p in used) / world_size()).backward()
        sum_on_host(averager.counts)
        averager.finish()
    return [parameter.grad for parameter in parameters]


def exchanges():
    """Every exchange of values, with values of this rank."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, float(rank()))
    broadcast_model(model)
    return {
        "largest": largest_over_ranks({"a": float(rank()), "b": 2.0 - rank()}),
        "gathered": gather_objects(rank()),
        "broadcast": broadcast_object(rank()),
        "same": (same_on_all_ranks("x"), same_on_all_ranks(rank())),
        "weights": gather_objects(model.weight[0].tolist()),
    }


def given_other_settings():
    settings = {"SOLVER.BASE_LR": 0.2 if rank() == 1 else 0.1, "SOLVER.MAX_ITER": 5}
    if rank() == 2:
        del settings["SOLVER.MAX_ITER"]
    refuse_differences(settings, "start all alike")


def compressed_gradients():
    """The mean of one gradient, in its own precision and in half precision."""
    means = []
    for compress in (None, torch.float16):
        parameter = nn.Parameter(torch.zeros(1))
        averager = GradientAverager([parameter], compress)
        with averager.taking_part(joins=True), averager.last_backward():
            (parameter / 3 / world_size() * averager.divisor).sum().backward()
        means.append(parameter.grad.item())
    return means


def measured_noise(model_classes, rank_sizes):
    """The noise of one step for each model, in micro-batches of the given sizes on each rank."""
    micro_batches = split(make_samples(sum(map(sum, rank_sizes))), rank_sizes)[rank()]
    return [
        forward_backward(model_class(torch.float64))(micro_batches, measure=True).noise
        for model_class in model_classes
    ]
