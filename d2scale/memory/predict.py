"""From two training steps on a CPU to the memory that training takes on a CUDA device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from d2scale.memory.allocator import MIB
from d2scale.memory.cuda_like import CudaLike
from d2scale.memory.replay import needed_bytes, replay
from d2scale.memory.steps import TrainingStep
from d2scale.memory.stream import Stream, Trace
from d2scale.memory.tracker import StorageTracker
from d2scale.planning.memory_profile import PREDICTED, MemoryProfile, Phase, Point

logger = logging.getLogger(__name__)

# What a CUDA context takes with the kernels of torch, cuBLAS and cuDNN loaded. It differs from
# device to device and cannot be known without one; a measured profile has the device's own.
CONTEXT_BYTES = 450 * MIB
# cuBLAS keeps this from the first matrix product on (8 MiB and 128 KiB; 32 MiB on Hopper).
LIBRARY_BYTES = 32 * MIB
# What share of the operands' size a convolution asks for as workspace. Not calibrated on a
# device yet: at 0 they count as part of what the allocator loses to fragmentation.
WORKSPACE_FACTOR = 0.0

# Images at which the allocator is played. Its losses rise and fall with the number of images.
_PLAYED = (1, 2, 3, 5, 8, 13)
_CPU = torch.device("cpu")
_NOT_FAKEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


@dataclass(frozen=True)
class Workload:
    """A training whose memory is asked for.

    Attributes:
        build_step: makes model and optimizer, on a device.
        make_batch: makes the worst batch of a number of images, on the CPU.
        make_batches: makes the batches of a few steps for a number of images, the worst, smaller
            ones and the worst again; None: the worst twice.
        description: of model, input size and precision, in words.
        covers: the settings that it stands for; see :mod:`d2scale.planning.coverage`.
    """

    build_step: Callable[[torch.device], TrainingStep]
    make_batch: Callable[[int], Any]
    make_batches: Callable[[int], Sequence[Any]] | None = None
    description: str = ""
    covers: dict[str, Any] | None = None


@dataclass(frozen=True)
class Prediction:
    """What was learnt from two steps.

    Attributes:
        stream: the step, for any number of images.
        gradient_bytes: of all gradients together.
        fake: whether the steps were taken with fake tensors.
    """

    stream: Stream
    gradient_bytes: int
    fake: bool

    def live_bytes(self, ims_per_gpu: int) -> int:
        """Return the most bytes that tensors hold at one moment of a step."""
        lines = [line for group in self.stream.peak_lines().values() for line in group]
        return round(max(line.at(ims_per_gpu) for line in lines))

    def reserved_bytes(self, ims_per_gpu: int, world_size: int = 1) -> int:
        """Return the most that the allocator reserves when nothing limits it."""
        # Later steps find a cache that the first has left in pieces.
        allocator = replay(
            self.stream,
            [ims_per_gpu] * 3,
            held=self._held(world_size),
            workspace_factor=WORKSPACE_FACTOR,
        )
        return allocator.peak_reserved

    def needed_bytes(self, ims_per_gpu: int, world_size: int = 1) -> int:
        """Return what the allocator must be given for steps of mixed image sizes."""
        held = self._held(world_size)
        return needed_bytes(self.stream, ims_per_gpu, held=held, workspace_factor=WORKSPACE_FACTOR)

    def profile(self, workload: Workload, *, caching: bool = True) -> MemoryProfile:
        """Return the memory profile of ``workload``, which this was made from.

        Args:
            workload: the training.
            caching: for a CUDA device, whose caching allocator and runtime take memory besides;
                False: for one where tensors take their bytes and nothing else does.
        """
        points = tuple(self._point(m, caching) for m in _PLAYED)
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
            CONTEXT_BYTES if caching else 0,
            self.gradient_bytes,
            dict(workload.covers or {}),
            points,
        )

    def _point(self, images: int, caching: bool) -> Point:
        live = self.live_bytes(images)
        if not caching:
            return Point(images, live, live, live)
        return Point(images, live, self.reserved_bytes(images), self.needed_bytes(images))

    def _held(self, world_size: int) -> tuple[int, ...]:
        buckets = (self.gradient_bytes,) if world_size > 1 else ()
        return (LIBRARY_BYTES, *buckets)


def _allocator_losses(points: tuple[Point, ...]) -> tuple[int, float]:
    """Return (constant, fraction): needed is at most live * (1 + fraction) + constant."""
    losses = [(point.needed_bytes or 0) - point.live_bytes for point in points]
    constant = losses[0]
    fractions = [
        (loss - constant) / point.live_bytes for loss, point in zip(losses, points, strict=True)
    ]
    return constant, max(0.0, *fractions)


def predict(workload: Workload, *, fake: bool | None = None) -> Prediction:
    """Take a step with one and one with two images, and count.

    Args:
        workload: the training.
        fake: use fake tensors, which take no memory and no time; None: if the model runs on
            them, that is, if no shape and no choice in it depends on values.

    Raises:
        Exception: what the model raises for another reason than fake tensors.
    """
    if fake is not None:
        return _predict(workload, fake)
    try:
        return _predict(workload, True)
    except _NOT_FAKEABLE as error:
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
        _choose_as_on_cuda(step.optimizer)
        tracker = StorageTracker()
        with tracker:
            tracker.count(*step.model.parameters(), *step.model.buffers())
            step.make_optimizer_state()
        traces = [record_step(step, workload.make_batch(m), tracker) for m in (1, 2)]
        gradient_bytes = sum(p.numel() * p.element_size() for p in step.parameters())
    return Prediction(Stream.from_traces(*traces), gradient_bytes, fake)


def _fake_step(workload: Workload, mode: FakeTensorMode) -> TrainingStep:
    """Build with fake tensors; or in earnest, and then replace them."""
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


def _choose_as_on_cuda(optimizer: torch.optim.Optimizer) -> None:
    """Take the form that torch takes on CUDA where nobody has chosen: all tensors at once."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def record_step(step: TrainingStep, batch: Any, tracker: StorageTracker) -> Trace:
    """Take one step and return what it allocated and freed."""
    tracker.reset_peak()
    with tracker, tracker.recording() as trace:
        step(batch, tracker.phase)
    return trace
