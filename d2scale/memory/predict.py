"""Predicting the memory that training takes on a CUDA device, from two steps on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from d2scale.memory.cuda_like import CudaLike
from d2scale.memory.replay import needed_bytes, replay
from d2scale.memory.stream import Stream, Trace
from d2scale.memory.tracker import StorageTracker
from d2scale.planning.gpu_assumptions import LIBRARY_BYTES, WORKSPACE_PART, context_bytes
from d2scale.planning.memory_profile import PREDICTED, MemoryProfile, Phase, Point
from d2scale.step import ranks
from d2scale.step.averaging import BUFFERS, averaging_bytes
from d2scale.step.micro_batches import MicroBatch
from d2scale.step.norms import without_synchronised_norms
from d2scale.step.optimizer_step import OptimizerStep, learning_rates_zero
from d2scale.step.private_torch import NOT_FAKEABLE, FakeTensorMode
from d2scale.step.update import trained_parameters

logger = logging.getLogger(__name__)

# Images at which the allocator is replayed. Its losses rise and fall with the number of images.
_REPLAYED = (1, 2, 3, 5, 8, 13)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Workload:
    """A training whose memory is predicted or measured."""

    # Builds model, optimizer and step on a device.
    build_step: Callable[[torch.device], OptimizerStep]
    # Makes the worst batch of a number of images, on the CPU.
    make_batch: Callable[[int], MicroBatch]
    # Makes the batches of a trial for a number of images: the worst, smaller ones and the worst
    # again. None: the worst twice.
    make_batches: Callable[[int], Sequence[MicroBatch]] | None = None
    description: str = ""  # of model, input size and precision, in words
    # The settings that it stands for; see :mod:`d2scale.planning.coverage`.
    covers: Mapping[str, Any] = field(default_factory=dict)

    def trial_batches(self, images: int) -> Sequence[MicroBatch]:
        """Return the batches of a trial."""
        if self.make_batches is None:
            return [self.make_batch(images)] * 2
        return self.make_batches(images)


@dataclass(frozen=True)
class Prediction:
    """The memory of a training step for any number of images."""

    stream: Stream  # what the step allocates and frees, on one rank
    gradient_bytes: int  # of all gradients together
    averaging_bytes: int  # what averaging them over ranks adds
    fake: bool  # whether the steps were taken on fake tensors

    def live_bytes(self, ims_per_gpu: int) -> int:
        """Return the most bytes that tensors hold at one moment of a step."""
        lines = [line for group in self.stream.peak_lines().values() for line in group]
        return round(max(line.at(ims_per_gpu) for line in lines))

    def reserved_bytes(self, ims_per_gpu: int, world_size: int = 1) -> int:
        """Return the most that the allocator reserves when nothing limits it."""
        # The first step leaves the allocator's cache in pieces for the later ones.
        steps = [ims_per_gpu] * 3
        return replay(self.stream, steps, held=self._held(world_size)).peak_reserved

    def needed_bytes(self, ims_per_gpu: int, world_size: int = 1) -> int:
        """Return what the allocator must be given for steps of mixed image sizes."""
        return needed_bytes(self.stream, ims_per_gpu, held=self._held(world_size))

    def profile(self, workload: Workload, *, caching: bool = True) -> MemoryProfile:
        """Return the memory profile of ``workload``, which was predicted.

        Args:
            workload: the training.
            caching: for a CUDA device, whose caching allocator and runtime take memory besides;
                False: for one that holds the bytes of tensors and nothing else.
        """
        points = tuple(self._point(images, caching) for images in _REPLAYED)
        constant, fraction = _allocator_losses(points)
        phases = tuple(
            Phase(
                name,
                max(0, round(constant + (1 + fraction) * line.static_bytes)),
                max(0, round((1 + fraction) * line.bytes_per_image)),
            )
            for name, lines in self.stream.peak_lines().items()
            for line in lines
        )
        kind = "fake tensors" if self.fake else "real steps"
        return MemoryProfile(
            phases,
            PREDICTED,
            f"{workload.description}; counted with {kind} on a CPU, torch {torch.__version__}, "
            "steps of 1 and 2 images",
            context_bytes() if caching else 0,
            self.gradient_bytes,
            self.averaging_bytes,
            dict(workload.covers),
            points,
        )

    def _point(self, images: int, caching: bool) -> Point:
        live = self.live_bytes(images)
        if not caching:
            return Point(images, live, live, live)
        return Point(images, live, self.reserved_bytes(images), self.needed_bytes(images))

    def _held(self, world_size: int) -> list[int]:
        buffers = [self.averaging_bytes // BUFFERS] * BUFFERS
        return [LIBRARY_BYTES, *(buffers if world_size > 1 else [])]


def _allocator_losses(points: tuple[Point, ...]) -> tuple[int, float]:
    """Return (constant, fraction): needed is at most live * (1 + fraction) + constant."""
    losses = [(point.needed_bytes or 0) - point.live_bytes for point in points]
    constant = losses[0]
    fractions = [
        (loss - constant) / point.live_bytes for loss, point in zip(losses, points, strict=True)
    ]
    return constant, max(0.0, *fractions)


def predict(workload: Workload, *, fake: bool | None = None) -> Prediction:
    """Take a step with one and one with two images, and count. No rank waits for another.

    Args:
        workload: the training.
        fake: use fake tensors, which take no memory and no time; None: if the model runs on
            them, that is, if no shape and no choice in it depends on values.

    Raises:
        Exception: what the model raises for another reason than fake tensors.
    """
    with ranks.alone():
        if fake is not None:
            return _predict(workload, fake)
        try:
            return _predict(workload, True)
        except NOT_FAKEABLE as error:
            logger.info("The model does not run on fake tensors (%s): counting real steps", error)
            return _predict(workload, False)


def _predict(workload: Workload, fake: bool) -> Prediction:
    with ExitStack() as stack:
        stack.enter_context(CudaLike(fake=fake))
        if fake:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            step = _fake_step(workload, mode)
            stack.enter_context(mode)
        else:
            step = workload.build_step(_CPU)
        without_synchronised_norms(step.model, "the prediction is for one rank")
        traces, _ = record_steps(step, workload, (1, 2))
        parameters = trained_parameters(step.optimizer)
        gradient_bytes = sum(p.numel() * p.element_size() for p in parameters)
    stream = Stream.from_traces(*traces)
    return Prediction(stream, gradient_bytes, averaging_bytes(parameters), fake)


def _fake_step(workload: Workload, mode: FakeTensorMode) -> OptimizerStep:
    """Build the step with fake tensors; or with real ones, and then replace them."""
    try:
        with mode:
            return workload.build_step(_CPU)
    except RuntimeError:
        # Fake parameters cannot be moved to a device, not even to their own.
        step = workload.build_step(_CPU)
    fakes = {
        p: nn.Parameter(mode.from_tensor(p.detach()), p.requires_grad)
        for p in step.model.parameters()
    }
    for module in step.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, fakes[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, mode.from_tensor(buffer))
    for group in step.optimizer.param_groups:
        group["params"] = [fakes[parameter] for parameter in group["params"]]
    return step


def choose_as_on_cuda(optimizer: torch.optim.Optimizer) -> None:
    """Take the form that torch takes on CUDA where nobody has chosen: all tensors at once."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def make_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer allocate what it keeps between steps, with gradients of zero."""
    for parameter in trained_parameters(optimizer):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def record_steps(
    step: OptimizerStep, workload: Workload, images: Sequence[int]
) -> tuple[list[Trace], StorageTracker]:
    """Take a step with each number of ``images``, as on a GPU; return what was recorded."""
    choose_as_on_cuda(step.optimizer)
    tracker = StorageTracker(workspace_part=WORKSPACE_PART)
    with tracker:
        tracker.count(*step.held_tensors())
        make_optimizer_state(step.optimizer)
    # With random weights an update can make the next step overflow.
    with learning_rates_zero(step.optimizer):
        traces = [record_step(step, workload.make_batch(count), tracker) for count in images]
    return traces, tracker


def record_step(step: OptimizerStep, batch: MicroBatch, tracker: StorageTracker) -> Trace:
    """Take one step in one micro-batch and return what it allocated and freed."""
    step.ims_per_gpu = len(batch)
    step.phase = tracker.phase
    step.optimizer.zero_grad()
    tracker.reset_peak()
    # What no phase of the step covers, such as its loss normalizers, counts as forward.
    with tracker, tracker.phase("forward"), tracker.recording() as trace:
        step.attempt(batch)
    return trace
