"""The memory of a detectron2 training: its own model, optimizer and worst batches."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from detectron2.data import DatasetMapper
from detectron2.utils.events import EventStorage
from torch import nn
from torch.amp.grad_scaler import GradScaler

from d2scale.detectron2.private_upstream import without_gradient_buckets
from d2scale.detectron2.worst_batches import (
    Mapper,
    TrainingImages,
    WorstBatches,
    images_of,
    worst_batches,
)
from d2scale.detectron2.worst_proposals import give_most_foreground
from d2scale.errors import DataError, Fault
from d2scale.memory.devices import CudaDevice, hold_to_budget
from d2scale.memory.predict import Prediction, Workload, predict
from d2scale.memory.preserve import random_numbers_kept
from d2scale.memory.probe import measure_workload
from d2scale.planning.coverage import coverage
from d2scale.planning.hardware import Hardware
from d2scale.planning.memory_profile import GIB, MemoryProfile
from d2scale.step import ranks
from d2scale.step.optimizer_step import OptimizerStep
from d2scale.step.private_torch import NOT_FAKEABLE


def check_memory(cfg: Any, engine: str) -> None:
    """Refuse a budget or a profile that no number of ranks could be planned with.

    Raises:
        ConfigError: with all faults.
    """
    Hardware.from_cfg(cfg, 1, device_gib=device_gib_of(cfg), engine=engine)


class TrainingMemory(ABC):
    """How many images fit in a training of ``cfg``, measured or predicted.

    Each engine says how it builds a step and a mapper.

    Args:
        cfg: of the training, not scaled.
        model: about to be trained. It leaves the device while another one like it is measured
            there. None: there is none.
    """

    engine: str  # its name
    keeps_buckets = False  # whether the model trains in its DistributedDataParallel

    def __init__(self, cfg: Any, model: nn.Module | None = None) -> None:
        self._cfg = cfg
        self._model = model

    @abstractmethod
    def build_step(self, cfg: Any, device: torch.device) -> OptimizerStep:
        """Return the step of a new model with random weights on ``device``."""

    def make_mapper(self, cfg: Any) -> Mapper:
        """Return the mapper of training, with the sizes of ``cfg``."""
        mapper: Mapper = DatasetMapper(cfg, True)
        return mapper

    def images(self) -> TrainingImages:
        """Return the images of the training."""
        return images_of(self._cfg, self.make_mapper)

    @property
    def model_name(self) -> str:
        """The model's name, for the description of a profile."""
        return str(self._cfg.MODEL.META_ARCHITECTURE)

    def covers(self, cfg: Any) -> dict[str, Any]:
        """Return the settings that a profile of ``cfg`` holds for."""
        return coverage(cfg, engine=self.engine)

    @property
    def measures(self) -> bool:
        """Whether memory is measured on the devices of all ranks, not predicted by one rank."""
        return bool(_on_cuda(self._cfg) and self._cfg.D2SCALE.MEMORY.PROBE)

    @cached_property
    def batches(self) -> WorstBatches:
        """The largest batches of the training dataset."""
        with random_numbers_kept():
            return worst_batches(self.images())

    def device_gib(self) -> float | None:
        """Return the memory of the smallest GPU of all ranks, None on a CPU. All ranks call it."""
        gib = device_gib_of(self._cfg)
        return None if gib is None else -ranks.largest_over_ranks({"gib": -gib})["gib"]

    def generation(self) -> int:
        """Return the first number of the GPU's compute capability, 0 on a CPU."""
        return torch.cuda.get_device_capability()[0] if _on_cuda(self._cfg) else 0

    def hold_to_budget(self) -> None:
        """Let the training of this process take no more than ``D2SCALE.MEMORY.BUDGET_GIB``."""
        if _on_cuda(self._cfg):
            hold_to_budget(_cuda_device().device, self._cfg.D2SCALE.MEMORY.BUDGET_GIB)

    def profile(self) -> MemoryProfile:
        """Measure on all ranks, or predict: with fake tensors, or with real steps on a CPU."""
        if not self.measures:
            return self._predicted_profile(self._cfg)
        images = self.batches.images
        most_images = min(self._cfg.D2SCALE.MAX_IMS_PER_BATCH or images, images)
        device = _cuda_device()
        with _as_in_training(self.batches.name), self._model_off_device():
            return measure_workload(
                self.workload(self._cfg),
                device,
                budget_bytes=round(self._cfg.D2SCALE.MEMORY.BUDGET_GIB * GIB) or device.total_bytes,
                most_images=max(1, most_images // ranks.world_size()),
            )

    def variants(self) -> tuple[MemoryProfile, ...]:
        """Predict the recipe in float32 and with AMP; nothing if that takes real steps."""
        variants = []
        for amp in (False, True):
            variant = self._cfg.clone()
            variant.defrost()
            variant.SOLVER.AMP.ENABLED = amp
            try:
                variants.append(self._predicted_profile(variant, fake=True))
            except NOT_FAKEABLE:
                return ()  # for some advice, minutes would be too long
        return tuple(variants)

    def workload(self, cfg: Any) -> Workload:
        """Return the training of ``cfg`` on the worst batches, with random weights."""
        amp = cfg.SOLVER.AMP
        numbers = f"AMP {amp.get('PRECISION', 'float16')}" if amp.ENABLED else "float32"
        height, width = self.batches.size
        return Workload(
            lambda device: self._build_worst_step(cfg, device),
            self.batches.batch,
            self.batches.trial_batches,
            f"{self.model_name} in {self.engine}, images of {height}x{width} pixels "
            f"with {self.batches.instances} instances ({self.batches.images} images of "
            f"{self.batches.name}), "
            f"{numbers}, {cfg.SOLVER.OPTIMIZER}",
            self.covers(cfg),
        )

    def _build_worst_step(self, cfg: Any, device: torch.device) -> OptimizerStep:
        step = self.build_step(cfg, device)
        give_most_foreground(step.model)
        return step

    def predicted(self, cfg: Any, *, fake: bool | None = None) -> Prediction:
        """Predict the memory of ``cfg``; ``fake`` as for :func:`predict`."""
        with _as_in_training(self.batches.name):
            return predict(self.workload(cfg), fake=fake)

    def _predicted_profile(self, cfg: Any, *, fake: bool | None = None) -> MemoryProfile:
        return self.predicted(cfg, fake=fake).profile(self.workload(cfg))

    @contextmanager
    def _model_off_device(self) -> Iterator[None]:
        if self._model is None:
            yield
            return
        model = self._model if self.keeps_buckets else without_gradient_buckets(self._model)
        device = next(model.parameters()).device
        model.to("cpu")
        try:
            yield
        finally:
            model.to(device)


def autocast_for(
    device: torch.device, precision: torch.dtype | None
) -> tuple[torch.dtype | None, GradScaler | None]:
    """Return the dtype of autocast and the scaler with which ``precision`` is measured there."""
    if precision is not torch.float16:
        return precision, None
    if device.type == "cuda":
        return precision, GradScaler("cuda")
    return torch.bfloat16, None  # as many bytes, and much faster on a CPU


@contextmanager
def _as_in_training(dataset: str) -> Iterator[None]:
    """Within the context, models can write events, and random numbers are restored at the end.

    Raises:
        DataError: if the samples of ``dataset`` lack what the model learns from, such as masks.
    """
    try:
        # Not from iteration 0, in which models draw pictures of their proposals.
        with random_numbers_kept(), EventStorage(1):
            yield
    except AttributeError as error:
        lacking = re.search(r"Cannot find field '(\w+)'", str(error))
        if lacking is None:
            raise
        allowed = f"a dataset with what the model learns from: {lacking[1]}"
        advice = "add it to the annotations, or train a model that does not need it"
        raise DataError([Fault("DATASETS.TRAIN", dataset, allowed, advice)]) from error


def device_gib_of(cfg: Any) -> float | None:
    """Return the memory of this rank's GPU, None on a CPU."""
    return _cuda_device().total_bytes / GIB if _on_cuda(cfg) else None


def _cuda_device() -> CudaDevice:
    return CudaDevice(torch.device("cuda", torch.cuda.current_device()))


def _on_cuda(cfg: Any) -> bool:
    return cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available()
