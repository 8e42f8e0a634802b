"""Measure what advice on a batch needs, with a config alone: noise of first steps, and speeds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import nn

from d2scale.benchmark.data import open_batches
from d2scale.benchmark.measure import BenchmarkOptions, measure_training
from d2scale.coco.dataset import load_training_dataset
from d2scale.config.value_rules import number, whole
from d2scale.engine.checkpoint.weights import find_weights
from d2scale.engine.data.transforms import input_faults
from d2scale.engine.honoured import value_faults
from d2scale.engine.models import build_model, check_model, device_of, load_initial_weights
from d2scale.engine.planning import largest_ims_per_gpu
from d2scale.engine.run import for_this_machine
from d2scale.engine.solver import build_lr_schedule
from d2scale.engine.step import build_step
from d2scale.engine.telemetry.machine import describe_machine
from d2scale.engine.trainer import Trainer
from d2scale.errors import ConfigError, Fault, collecting
from d2scale.planning.advice import Candidate
from d2scale.planning.gain import NoisePoint
from d2scale.run_folder.measurements import (
    Measurements,
    RecipeNoise,
    recipe_to_compare,
    setting_of,
)
from d2scale.step.clock import StepClock
from d2scale.step.norms import without_synchronised_norms

# Where no memory sets a limit: times the recipe's batch, and images.
_RATIO, _IMAGES = 4, 64
# Of each batch.
_TIMED_STEPS, _WARMUP_STEPS = 10, 3
# The part of the time that the noise may take.
_NOISE_PART = 0.5
# An average of fewer steps says nothing.
_FEWEST_STEPS = 10
# Where speeds come from, in a table's JSON.
_HERE = "measured here"


@dataclass(frozen=True)
class FirstStepsOptions:
    """What to measure, and for how long."""

    steps: int = 100  # of the recipe, for the noise
    measures_noise: bool = True
    minutes: float = 10.0  # a batch that would take longer is left out
    max_ims_per_gpu: int = 0  # 0: as many as fit; on a CPU four times the recipe's batch
    variants: bool = False  # the other precision and activation checkpointing too

    def faults(self) -> list[Fault]:
        """Return what is out of range."""
        return [
            *whole("--steps", _FEWEST_STEPS).faults(self.steps),
            *number("--minutes", above=0).faults(self.minutes),
            *whole("--max-ims-per-gpu", 0, advice="0: as many as fit").faults(self.max_ims_per_gpu),
        ]


def measure_first_steps(cfg: CfgNode, options: FirstStepsOptions) -> Measurements:
    """Train the recipe's first steps for their noise, then time steps of several batches.

    The noise is that of the recipe's own batch, in two parts at least. Batches of 1, 2, 4, ...
    images, the recipe's and the most that fit are timed on one device. Nothing is written.

    Raises:
        ConfigError: with all faults of options, config and data, or if one image does not fit.
    """
    cfg, notes = for_this_machine(cfg)
    cfg.D2SCALE.ON_OOM = "split"  # what does not fit is left out then
    recipe = _checked(cfg, options)
    started, seconds = time.monotonic(), 60 * options.minutes
    if options.measures_noise:
        points = _noise(cfg, recipe, options.steps, started + _NOISE_PART * seconds)
        recipe = replace(recipe, points=tuple(points))
    measured = Measurements(recipe, (), describe_machine(device_of(cfg)), True, notes)
    for variant in _variants(cfg) if options.variants else [cfg]:
        sizes = _sizes(variant, recipe.ims_per_batch, options.max_ims_per_gpu)
        speeds = dict(_speeds(variant, sizes.order, started + seconds))
        measured = replace(
            measured,
            candidates=(*measured.candidates, *_candidates(variant, recipe, sizes, speeds)),
            notes=(*measured.notes, *_notes(variant, recipe, sizes, speeds)),
        )
    return measured


def _checked(cfg: CfgNode, options: FirstStepsOptions) -> RecipeNoise:
    """Return the recipe, without noise; ConfigError with every fault."""
    faults = [*options.faults(), *value_faults(cfg), *input_faults(cfg)]
    for check in (check_model, load_training_dataset, _check_weights):
        with collecting(faults):
            check(cfg)
    recipe = RecipeNoise("", {})
    with collecting(faults):
        recipe = recipe_to_compare(cfg, "the config, measured here")
        advice = "noise is measured between two images of a step, or more"
        faults += whole("SOLVER.IMS_PER_BATCH", 2, advice=advice).faults(recipe.ims_per_batch)
    if faults:
        raise ConfigError(faults)
    return recipe


def _check_weights(cfg: CfgNode) -> None:
    if cfg.MODEL.WEIGHTS:
        find_weights(cfg.MODEL.WEIGHTS)


def _noise(cfg: CfgNode, recipe: RecipeNoise, steps: int, end: float) -> Iterator[NoisePoint]:
    """Train the recipe's first steps, until the time is over, and yield the noise after each."""
    total, seed = recipe.ims_per_batch, max(cfg.SEED, 0)
    with open_batches(cfg, "real", training=True, ims_per_batch=total) as batches:
        # Two parts, so that every step measures and none has to be cut for it.
        step = build_step(cfg, _model(cfg), ims_per_gpu=-(-total // 2))
        schedule = build_lr_schedule(cfg, step.optimizer)
        clock = StepClock(recipe_ims_per_batch=total, max_iter=recipe.max_iter)
        trainer = Trainer(step, batches.batches, schedule, seed=seed, clock=clock)
        for number in range(min(steps, recipe.max_iter)):
            if number >= _FEWEST_STEPS and time.monotonic() > end:
                return
            metrics = trainer.take_step()
            if metrics.noise_scale is not None:
                yield NoisePoint(metrics.iterations, metrics.noise_scale)


def _model(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(max(cfg.SEED, 0))
    model = without_synchronised_norms(build_model(cfg).train())
    load_initial_weights(model, cfg.MODEL.WEIGHTS)
    return model


def _variants(cfg: CfgNode) -> Iterator[CfgNode]:
    """Yield the config, then it in the other precision, and so on, as far as the model offers."""
    own = cfg.SOLVER.AMP.ENABLED, cfg.D2SCALE.ACTIVATION_CHECKPOINTING
    choices = itertools.product((False, True), repeat=2)
    for amp, checkpointing in sorted(choices, key=lambda choice: choice != own):
        variant = cfg.clone()
        variant.SOLVER.AMP.ENABLED = amp
        variant.D2SCALE.ACTIVATION_CHECKPOINTING = checkpointing
        variant, _ = for_this_machine(variant)
        faults: list[Fault] = []
        with collecting(faults):
            check_model(variant)
        if not faults:
            yield variant


class _Sizes(NamedTuple):
    """The images per GPU to time."""

    order: tuple[int, ...]  # the most useful first
    most: int  # no more were wanted
    fit: int  # the most that fit; 0: that is not known


def _sizes(cfg: CfgNode, recipe_ims_per_batch: int, cap: int) -> _Sizes:
    """Choose 2, 4, 8, ... images per GPU, the recipe's batch and the most that fit.

    The recipe's batch is first, or the largest part of it that may fit; then come larger ones.
    """
    fit = 0 if cfg.D2SCALE.IMS_PER_GPU else largest_ims_per_gpu(cfg) or 0
    usual = min(_RATIO * recipe_ims_per_batch, _IMAGES)
    images = len(load_training_dataset(cfg))
    most = min(images, fit or cap or usual, cap or fit or usual)
    parts = range(min(most, recipe_ims_per_batch), 0, -1)
    part = next(size for size in parts if recipe_ims_per_batch % size == 0)
    sizes = {*(2**power for power in range(1, most.bit_length())), part, most}
    order = sorted(sizes, key=lambda size: (size < part, abs(size - part)))
    return _Sizes(tuple(order), most, fit)


def _speeds(cfg: CfgNode, sizes: Sequence[int], end: float) -> Iterator[tuple[int, float]]:
    """Yield sizes that fit with their images a second, as far as the time reaches."""
    model, seconds_an_image = _model(cfg), 0.0
    options = BenchmarkOptions(steps=_TIMED_STEPS, warmup_steps=_WARMUP_STEPS, counts_memory=False)
    for size in sizes:
        needed = seconds_an_image * size * (_TIMED_STEPS + _WARMUP_STEPS)
        if seconds_an_image and time.monotonic() + needed > end:
            continue
        step = build_step(cfg, model, ims_per_gpu=size)
        with open_batches(cfg, "real", training=True, ims_per_batch=size) as batches:
            figures = measure_training(step, batches, options)
        seconds_an_image = 1 / figures["images a second"]
        if step.ims_per_gpu == size:  # it has not been cut for lack of memory
            yield size, figures["images a second"]


def _candidates(
    cfg: CfgNode, recipe: RecipeNoise, sizes: _Sizes, speeds: Mapping[int, float]
) -> Iterator[Candidate]:
    """Yield the batches of one micro-batch, and the recipe's own in several if it is not there."""
    setting, total = setting_of(cfg), recipe.ims_per_batch
    for size, speed in speeds.items():
        if size > 1:  # noise is measured between the images of a step
            yield Candidate(size, 1, size, setting, speed, _HERE, fills_memory=size == sizes.fit)
    parts = [size for size in speeds if total % size == 0]
    if parts and total not in speeds:
        fastest = max(parts, key=lambda size: speeds[size])
        yield Candidate(total, 1, fastest, setting, speeds[fastest], _HERE)


def _notes(
    cfg: CfgNode, recipe: RecipeNoise, sizes: _Sizes, speeds: Mapping[int, float]
) -> Iterator[str]:
    """Yield what was not measured, and what was concluded from something else."""
    setting, total = setting_of(cfg), recipe.ims_per_batch
    if missing := sorted(set(sizes.order) - set(speeds)):
        images = ", ".join(map(str, missing))
        reason = "the time (--minutes) or the memory did not suffice"
        yield f"not measured: {images} images per GPU in {setting}, for {reason}"
    if total not in speeds:
        yield f"the recipe's {total} images a step in {setting} have the speed of their micro-batch"
    if sizes.most != sizes.fit:
        yield f"no more than {sizes.most} images per GPU were tried (--max-ims-per-gpu)"
