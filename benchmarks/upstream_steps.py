"""Trainings of detectron2's models by its own trainer on a cluster, and by virtual ranks."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import upstream_models
import upstream_samples
from torch import Tensor, nn
from upstream_in_float64 import losses_in_float64

from d2scale.planning.rules import own_virtual_ranks
from d2scale.step import ranks
from d2scale.step.optimizer_step import OptimizerStep, StepOptions
from d2scale.step.random_stream import random_stream
from d2scale.step.virtual_ranks import VirtualRanks

SEED = 7
EACH = 2  # images of a virtual rank


class Training(NamedTuple):
    """What is trained."""

    model: str
    virtual_ranks: int = 4
    steps: int = 5
    dtype: str = "float64"
    data: str = "drawn"  # or "COCO", or "detectron2": COCO by detectron2's own loader
    flips: bool = True  # of COCO's images


class Trained(NamedTuple):
    """What a training has made of a model, as vectors."""

    weights: Tensor
    buffers: Tensor  # and moving normalizers, of the first rank
    change: float  # of the weights, a norm
    loss: float  # the last step's on this process, to see that it is a training


def take_turns(
    function: Callable[..., Trained], trainings: list[Training], *arguments: Any
) -> list[Trained]:
    """Train one after the other: starting processes takes longer than a training."""
    logging.disable(logging.WARNING)  # d2go tells each of its layers
    return [function(training, *arguments) for training in trainings]


def train_on_cluster(training: Training, order: tuple[int, ...]) -> Trained:
    """Train by detectron2's trainer and DDP; this process is number ``order[rank]``."""
    from detectron2.engine import SimpleTrainer, create_ddp_model

    with _precision(training.dtype):
        model = upstream_models.build(training.model, SEED)
        number = order[ranks.rank()]
        loader = samples(training, range(number, number + 1))
        start = _weights(model)
        wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
        trainer = SimpleTrainer(wrapped, loader, _optimizer(model), gather_metric_period=10**9)
        trainer.register_hooks([_streams_of(number)])
        trainer.train(0, training.steps)
        return _trained(model, start, trainer.storage)


def train_virtual_ranks(training: Training, ordered: bool) -> Trained:
    """Train all virtual ranks on the processes that there are."""
    from detectron2.utils.events import EventStorage

    with _precision(training.dtype), EventStorage() as storage:
        model = upstream_models.build(training.model, SEED)
        start = _weights(model)
        count = training.virtual_ranks
        virtual_ranks = VirtualRanks(model, count, SEED, ordered=ordered)
        options = StepOptions(virtual_ranks=virtual_ranks, on_oom="raise")
        step = OptimizerStep(model, _optimizer(model), ims_per_gpu=EACH, options=options)
        loader = samples(training, own_virtual_ranks(count, ranks.rank(), ranks.world_size()))
        for number in range(training.steps):
            losses = step(next(loader), number=number)
        storage.put_scalar("total_loss", losses.total)
        return _trained(model, start, storage)


def samples(training: Training, own: range) -> Iterator[list[Any]]:
    """Yield the images of these virtual ranks, step by step."""
    if training.data == "drawn":
        return _drawn(training, own)
    from detectron2.data import build_detection_train_loader

    from d2scale.detectron2.data.loader import train_loader, with_even_batch

    name = "RetinaNet" if training.model == "FCOS" else training.model
    cfg = upstream_models.narrow_cfg(name)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96,), 128
    cfg.INPUT.RANDOM_FLIP = "horizontal" if training.flips else "none"
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = training.virtual_ranks * EACH
    cfg.SEED = SEED
    loader = build_detection_train_loader(with_even_batch(cfg, ranks.world_size()))
    if training.data == "detectron2":
        return iter(loader)
    return train_loader(loader, own, training.virtual_ranks, EACH)


def _drawn(training: Training, own: range) -> Iterator[list[Any]]:
    for step in range(training.steps):
        drawn = [s for rank in own for s in upstream_samples.draw(rank, step, EACH)]
        persons = training.model.startswith("Keypoint")
        yield upstream_samples.as_persons(drawn) if persons else drawn


def _streams_of(number: int) -> Any:
    from detectron2.engine import HookBase

    class Streams(HookBase):
        """Gives every step the random stream that the virtual rank would have."""

        def before_step(self) -> None:
            self._stack = ExitStack()
            self._stack.enter_context(random_stream(SEED, self.trainer.iter, number))

        def after_backward(self) -> None:
            self._stack.close()

    return Streams()


def _optimizer(model: nn.Module) -> torch.optim.SGD:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=1e-4, momentum=0.9, weight_decay=1e-4)


@contextmanager
def _precision(dtype: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with losses_in_float64() if dtype == "float64" else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten().double() for weight in model.parameters()])


def _trained(model: nn.Module, start: Tensor, storage: Any) -> Trained:
    buffers = [buffer.flatten().double() for buffer in model.buffers()]
    normalizer = torch.tensor([getattr(model, "loss_normalizer", 0.0)], dtype=torch.float64)
    weights = _weights(model)
    change = float(torch.dist(weights, start))
    latest = storage.latest().get("total_loss", (0.0, 0))[0]
    return Trained(weights, torch.cat([*buffers, normalizer]), change, float(latest))


def step_seconds(training: Training) -> dict[str, float]:
    """Return the median processor time of a step, taken in turns by each kind of step."""
    from detectron2.utils.events import EventStorage

    steps: dict[str, OptimizerStep] = {}
    with _precision(training.dtype), EventStorage():
        for kind in ("plain", "virtual ranks", "ordered"):
            model = upstream_models.build(training.model, SEED)
            count = training.virtual_ranks
            virtual = VirtualRanks(model, count, SEED, ordered=kind == "ordered")
            options = StepOptions(virtual_ranks=None if kind == "plain" else virtual)
            steps[kind] = OptimizerStep(model, _optimizer(model), ims_per_gpu=EACH, options=options)
        taken: dict[str, list[float]] = {kind: [] for kind in steps}
        for number, batch in enumerate(samples(training, range(training.virtual_ranks))):
            for kind, step in steps.items():
                start = time.process_time()
                step(batch, number=number)
                taken[kind].append(time.process_time() - start)
    return {kind: statistics.median(seconds[2:]) for kind, seconds in taken.items()}
