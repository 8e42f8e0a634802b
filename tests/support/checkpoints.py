"""A tiny checkpoint of a run, and resuming from it."""

from __future__ import annotations

import torch

from d2scale.engine.checkpoint.checkpointer import RunCheckpointer
from d2scale.engine.checkpoint.resume import RunRecord, resume_training
from d2scale.engine.data.sampling import StepSampler
from d2scale.planning.progress import recipe_of
from d2scale.step.agreement import AgreedOutOfMemoryError
from d2scale.step.clock import StepClock
from d2scale.step.guard import MicroBatchSize
from standins import StandIn


def new_checkpointer(folder, cfg, plan):
    model = StandIn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    size = MicroBatchSize(4, torch.device("cpu"))
    checkpointer = RunCheckpointer(model, folder, optimizer=optimizer, micro_batches=size)
    RunRecord(checkpointer, plan, recipe_of(cfg), 7)
    return checkpointer


def write_checkpoint(folder, cfg, plan):
    """Write a checkpoint after the first step, and return its path."""
    clock, sampler = StepClock(), StepSampler(20, 4, 7)
    next(sampler)
    clock.steps = 1
    progress = {"iteration": 0, "images_seen": 4, "sampler": sampler.state_dict()}
    checkpointer = new_checkpointer(folder, cfg, plan)
    size = checkpointer.checkpointables["micro_batches"]
    failure = AgreedOutOfMemoryError("forward", [0], "")
    for _ in range(2):  # once it is taken again as it was
        size.after_failure(failure, 4)
    checkpointer.save("model_0000000", **progress, clock=clock.state_dict())
    return folder / "model_0000000.pth"


def resume(folder, cfg, plan):
    checkpointer = new_checkpointer(folder, cfg, plan)
    position = resume_training(checkpointer, cfg, plan, recipe_of(cfg), seed=7)
    checkpointer.checkpointables["optimizer"].step()
    size = checkpointer.checkpointables["micro_batches"]
    size.begin_step()
    size.end_step()
    sampler = StepSampler(20, 4, 7)
    if position.sampler is not None:
        sampler.load_state_dict(position.sampler)
    next(sampler)
