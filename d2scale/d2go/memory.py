"""The memory of a d2go training: its own model, optimizer, EMA copy and worst batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from d2go.runner import GeneralizedRCNNRunner
from d2go.trainer.helper import parse_precision_from_string
from detectron2.utils.events import EventStorage
from torch import nn
from torch.amp.grad_scaler import GradScaler

from d2scale.d2go.private_upstream import without_gradient_buckets
from d2scale.d2go.step import D2GoStep, build_step
from d2scale.d2go.worst_batches import WorstBatches, worst_batches
from d2scale.memory.devices import CudaDevice
from d2scale.memory.predict import Workload, predict
from d2scale.memory.preserve import random_numbers_kept
from d2scale.memory.probe import measure_workload
from d2scale.planning.coverage import coverage
from d2scale.planning.hardware import Hardware
from d2scale.planning.memory_profile import GIB, MemoryProfile
from d2scale.step import ranks
from d2scale.step.norms import without_synchronised_norms
from d2scale.step.private_torch import NOT_FAKEABLE

ENGINE = "d2go"


def check_memory(cfg: Any) -> None:
    """Refuse a budget or a profile that no number of ranks could be planned with.

    Raises:
        ConfigError: with all faults.
    """
    Hardware.from_cfg(cfg, 1, device_gib=_device_gib(cfg), engine=ENGINE)


class TrainingMemory:
    """How many images fit in a training of ``cfg``, measured or predicted.

    Args:
        cfg: of the Runner, not scaled.
        runner: builds model, optimizer and mapper; None: d2go's own.
        model: about to be trained. It leaves the device while another one like it is measured
            there. None: there is none.
    """

    def __init__(self, cfg: Any, runner: Any = None, model: nn.Module | None = None) -> None:
        self._cfg = cfg
        self._runner = runner or GeneralizedRCNNRunner()
        self._model = model

    @property
    def measures(self) -> bool:
        """Whether memory is measured on the devices of all ranks, not predicted by one rank."""
        return bool(_on_cuda(self._cfg) and self._cfg.D2SCALE.MEMORY.PROBE)

    @cached_property
    def batches(self) -> WorstBatches:
        """The largest batches of the training dataset."""
        with random_numbers_kept():
            return worst_batches(self._cfg, lambda cfg: self._runner.get_mapper(cfg, True))

    def device_gib(self) -> float | None:
        """Return the memory of the smallest GPU of all ranks, None on a CPU. All ranks call it."""
        gib = _device_gib(self._cfg)
        return None if gib is None else -ranks.largest_over_ranks({"gib": -gib})["gib"]

    def profile(self) -> MemoryProfile:
        """Measure on all ranks, or predict: with fake tensors, or with real steps on a CPU."""
        if not self.measures:
            return self._predicted(self._cfg)
        images = self.batches.images
        most_images = min(self._cfg.D2SCALE.MAX_IMS_PER_BATCH or images, images)
        device = _cuda_device()
        with _as_in_training(), self._model_off_device():
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
                variants.append(self._predicted(variant, fake=True))
            except NOT_FAKEABLE:
                return ()  # for some advice, minutes would be too long
        return tuple(variants)

    def workload(self, cfg: Any) -> Workload:
        """Return the training of ``cfg`` on the worst batches, with random weights."""
        amp = cfg.SOLVER.AMP
        height, width = self.batches.size
        return Workload(
            lambda device: self._build_step(cfg, device),
            self.batches.batch,
            self.batches.trial_batches,
            f"{cfg.MODEL.META_ARCHITECTURE} in d2go, images of {height}x{width} pixels with "
            f"{self.batches.instances} instances ({self.batches.images} images of "
            f"{','.join(cfg.DATASETS.TRAIN)}), "
            f"{f'AMP {amp.PRECISION}' if amp.ENABLED else 'float32'}, {cfg.SOLVER.OPTIMIZER}",
            coverage(cfg, engine=ENGINE),
        )

    def _predicted(self, cfg: Any, *, fake: bool | None = None) -> MemoryProfile:
        workload = self.workload(cfg)
        with _as_in_training():
            return predict(workload, fake=fake).profile(workload)

    def _build_step(self, cfg: Any, device: torch.device) -> D2GoStep:
        own = cfg.clone()
        own.defrost()
        own.MODEL.DEVICE = str(device)
        model = self._runner.build_model(own).train()
        # A rank that runs out of memory would leave the others waiting in a synchronised norm.
        without_synchronised_norms(model, "memory is being measured")
        if cfg.MODEL_EMA.ENABLED and cfg.MODEL_EMA.DEVICE in ("", cfg.MODEL.DEVICE):
            model.ema_state.save_from(model)
        amp, on_cuda = cfg.SOLVER.AMP, device.type == "cuda"
        precision = parse_precision_from_string(amp.PRECISION) if amp.ENABLED else None
        scaler = GradScaler("cuda") if on_cuda and precision is torch.float16 else None
        if precision is torch.float16 and not on_cuda:
            precision = torch.bfloat16  # as many bytes, and much faster on a CPU
        optimizer = self._runner.build_optimizer(own, model)
        return build_step(own, model, optimizer, precision=precision, scaler=scaler)

    @contextmanager
    def _model_off_device(self) -> Iterator[None]:
        if self._model is None:
            yield
            return
        # Where losses are watched, d2go's own step trains, with the wrapper's buckets.
        watched = self._cfg.ABNORMAL_CHECKER.ENABLED
        model = self._model if watched else without_gradient_buckets(self._model)
        device = next(model.parameters()).device
        model.to("cpu")
        try:
            yield
        finally:
            model.to(device)


@contextmanager
def _as_in_training() -> Iterator[None]:
    """Within the context, models can write events, and random numbers are restored at the end."""
    # Not from iteration 0, in which models draw pictures of their proposals.
    with random_numbers_kept(), EventStorage(1):
        yield


def _device_gib(cfg: Any) -> float | None:
    """Return the memory of this rank's GPU, None on a CPU."""
    return _cuda_device().total_bytes / GIB if _on_cuda(cfg) else None


def _cuda_device() -> CudaDevice:
    return CudaDevice(torch.device("cuda", torch.cuda.current_device()))


def _on_cuda(cfg: Any) -> bool:
    return cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available()
