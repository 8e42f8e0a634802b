"""Timing inference and training of a config on one device of this machine."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import ConstantParamScheduler
from tabulate import tabulate
from torch import nn

from d2scale.benchmark.data import Batches, open_batches
from d2scale.config.value_rules import MOST_IMAGES, whole
from d2scale.engine.checkpoint.weights import find_weights
from d2scale.engine.data.transforms import input_faults
from d2scale.engine.honoured import value_faults
from d2scale.engine.models import build_model, check_model, device_of, load_initial_weights
from d2scale.engine.solver import LearningRateSchedule
from d2scale.engine.step import build_step
from d2scale.engine.trainer import Trainer
from d2scale.errors import CheckpointError, ConfigError, Fault, collecting
from d2scale.memory.tracker import StorageTracker
from d2scale.planning.schedule import reference_world_size
from d2scale.step.optimizer_step import OptimizerStep
from d2scale.step.precision import bfloat16_faults, tf32_use

PARTS = ("inference", "training")


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure."""

    parts: tuple[str, ...] = PARTS
    data: str = "auto"  # real, random, or auto: the config's datasets if they are here
    images: int = 200  # to detect on, after those of the warm-up, which do not count
    warmup: int = 20
    steps: int = 20  # of training, likewise
    warmup_steps: int = 3
    ims_per_gpu: int = 0  # images in a training step; 0: those of one rank of the recipe
    counts_memory: bool = True  # of training on a CPU, with one more and slow step


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured: figures by name, none where not asked for."""

    facts: dict[str, Any]  # what decides the figures: device, weights, precision, versions
    inference: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def benchmark(cfg: CfgNode, options: BenchmarkOptions) -> BenchmarkResult:
    """Measure inference and training with a config.

    Inference time is that of the published figures: the network's forward and the
    post-processing of one image, averaged, without loading and without the first images.
    Training takes whole steps, loading included, at a learning rate of 0.

    ConfigError with every fault of the options and the config; DataError for missing or broken
    data where real data is asked for.
    """
    faults = [*_option_faults(options), *_device_faults(cfg), *value_faults(cfg)]
    faults += [*input_faults(cfg), *bfloat16_faults(cfg)]
    with collecting(faults):
        check_model(cfg)
    if faults:
        raise ConfigError(faults)
    torch.manual_seed(max(cfg.SEED, 0))
    model = build_model(cfg)
    weights = _load_weights(cfg, model)
    result = BenchmarkResult(_facts(cfg, weights))
    if "inference" in options.parts:
        with open_batches(cfg, options.data, training=False) as batches:
            result.inference.update(measure_inference(model, batches, options))
    if "training" in options.parts:
        of_rank = cfg.SOLVER.IMS_PER_BATCH // reference_world_size(cfg)
        of_recipe = int(cfg.D2SCALE.IMS_PER_GPU or of_rank)
        count = options.ims_per_gpu or max(1, of_recipe)
        with open_batches(cfg, options.data, training=True, ims_per_batch=count) as batches:
            step = build_step(cfg, model.train(), ims_per_gpu=count)
            result.training.update(measure_training(step, batches, options))
    return result


def _option_faults(options: BenchmarkOptions) -> Iterator[Fault]:
    for option, least in (("images", 1), ("warmup", 0), ("steps", 1), ("ims_per_gpu", 0)):
        key = "--" + option.replace("_", "-")
        yield from whole(key, least, MOST_IMAGES).faults(getattr(options, option))


def _device_faults(cfg: CfgNode) -> Iterator[Fault]:
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        yield Fault("--device", "cuda", "a device of this machine", "it has none: use cpu")
    amp = cfg.SOLVER.AMP
    if amp.ENABLED and amp.PRECISION == "float16" and cfg.MODEL.DEVICE == "cpu":
        advice = "set it to bfloat16, or measure on CUDA"
        yield Fault("SOLVER.AMP.PRECISION", "float16", "bfloat16 on a CPU", advice)


def _load_weights(cfg: CfgNode, model: nn.Module) -> str:
    """Load ``MODEL.WEIGHTS`` if they are here, and return their name: speed needs no weights."""
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        return "random"
    try:
        find_weights(weights)
    except CheckpointError:
        return f"random ({weights} is not on this machine)"
    load_initial_weights(model, weights)
    return str(weights)


def _facts(cfg: CfgNode, weights: str) -> dict[str, Any]:
    device, amp = device_of(cfg), cfg.SOLVER.AMP
    on_cuda = device.type == "cuda"
    tf32 = {"TF32": tf32_use(torch.cuda.get_device_capability(device)[0])} if on_cuda else {}
    return {
        "model": cfg.MODEL.META_ARCHITECTURE,
        "weights": weights,
        "device": torch.cuda.get_device_name(device) if on_cuda else "CPU",
        "threads": torch.get_num_threads(),
        "training precision": amp.PRECISION if amp.ENABLED else "float32",
        **tf32,
        "torch": torch.__version__,
    }


def measure_inference(
    model: nn.Module, batches: Batches, options: BenchmarkOptions
) -> dict[str, Any]:
    """Return times of detecting on single images."""
    device = next(model.parameters()).device
    model.eval()
    times, detected = [], 0
    samples = (sample for batch in batches.batches for sample in batch)
    with torch.no_grad():
        for number, sample in enumerate(itertools.islice(samples, options.warmup + options.images)):
            if number == options.warmup:
                _reset_peak(device)
            start = time.perf_counter()
            (detections,) = model([sample])
            # Copying to the host waits for the device.
            copied = [value.cpu() for value in detections.values()]
            times.append(time.perf_counter() - start)
            detected += len(copied[0]) * (number >= options.warmup)
    times = times[options.warmup :]
    mean = statistics.fmean(times)
    return {
        "images": len(times),
        "data": batches.source,
        "seconds an image": mean,
        "median seconds": statistics.median(times),
        "images a second": 1 / mean,
        "detections an image": detected / len(times),
        "peak GiB": _peak_gib(device),
    }


def measure_training(
    step: OptimizerStep, batches: Batches, options: BenchmarkOptions
) -> dict[str, Any]:
    """Return times of training steps; the weights do not change."""
    device = next(step.model.parameters()).device
    # Random weights behind frozen statistics could diverge.
    schedule = LearningRateSchedule(step.optimizer, ConstantParamScheduler(0.0), max_iter=1 << 30)
    trainer = Trainer(step, batches.batches, schedule, seed=0)
    for _ in range(options.warmup_steps):
        trainer.take_step()
    _reset_peak(device)
    _wait_for(device)
    start = time.perf_counter()
    taken = [trainer.take_step() for _ in range(options.steps)]
    _wait_for(device)
    seconds = time.perf_counter() - start
    images = taken[-1].images_seen // (options.warmup_steps + options.steps)
    return {
        "steps": len(taken),
        "images a step": images,
        "data": batches.source,
        "images a second": images * len(taken) / seconds,
        "seconds a step": statistics.median(metrics.seconds for metrics in taken),
        "data seconds a step": statistics.median(metrics.data_seconds for metrics in taken),
        "peak GiB": _peak_gib(device)
        or (_counted_gib(step, trainer) if options.counts_memory else None),
    }


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gib(device: torch.device) -> float | None:
    """Return the most that tensors held since the reset; None on a CPU, where torch counts none."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def _counted_gib(step: OptimizerStep, trainer: Trainer) -> float:
    """Take one more step with every storage counted, and return the most that were alive."""
    step.optimizer.zero_grad()
    with StorageTracker() as tracker:
        tracker.count(*step.held_tensors())
        trainer.take_step()
    return tracker.peak_bytes / 2**30


def to_table(result: BenchmarkResult) -> str:
    """Return the result as text: the facts, then a table of each part."""
    parts = [tabulate(list(result.facts.items()), tablefmt="plain")]
    for name in PARTS:
        figures = {key: v for key, v in getattr(result, name).items() if v is not None}
        rows = [(k, f"{v:.4g}" if isinstance(v, float) else str(v)) for k, v in figures.items()]
        if rows:
            parts.append(tabulate(rows, headers=[name, ""], tablefmt="pipe", disable_numparse=True))
    return "\n\n".join(parts)
