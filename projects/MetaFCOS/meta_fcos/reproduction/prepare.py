"""Checking the options of ``d2scale reproduce`` on this machine, and planning its experiments."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d2scale.coco.catalog import ROOT_VARIABLE
from d2scale.coco.dataset import check_datasets
from d2scale.engine.checkpoint.weights import find_weights
from d2scale.engine.config import load_cfg
from d2scale.engine.models import load_initial_weights, new_model
from d2scale.errors import ConfigError, D2ScaleError, Fault, collecting
from d2scale.launch.launch import under_torchrun
from d2scale.run_folder.lock import refuse_locked
from meta_fcos.reproduction.data import SMALL_IMAGES, Data, read_subset, small_data, whole_coco
from meta_fcos.reproduction.experiments import (
    EXPERIMENTS,
    PUBLISHED,
    Experiment,
    chosen,
    length_faults,
)
from meta_fcos.reproduction.folder import folder_faults
from meta_fcos.reproduction.planned_experiment import (
    Machine,
    PlannedExperiment,
    is_finished,
    plan_experiment,
    recipe_faults,
)


@dataclass(frozen=True)
class ReproductionOptions:
    """What the user asks for."""

    output_dir: str  # gets a run folder for each experiment, and the report
    form: str | None = None  # full, small, or None: full on a machine with a GPU
    images_seen: int | None = None  # images that each training shows; None: its recipe's
    num_gpus: int | None = None  # see Machine.at_hand
    only: str | None = None  # words of experiments, such as 1,gain; None: the published ones
    third_method: str = "published"  # or exact, see Experiment.recipe
    images: tuple[int, int] = SMALL_IMAGES


@dataclass(frozen=True)
class Reproduction:
    """Options that passed every check, and what follows from them."""

    folder: Path
    form: str
    settings: Mapping[str, Any]  # what must stay until the end, by the option that chooses it
    machine: Machine
    data: Data
    subset: Mapping[str, Mapping[str, Any]]  # annotations of the data, where COCO is cut
    training_images: int  # that have boxes; 0 where it was not counted
    experiments: tuple[PlannedExperiment, ...]  # asked for or finished, in their order
    finished: tuple[Experiment, ...]


def prepare(options: ReproductionOptions) -> Reproduction:
    """Check everything, and plan how each experiment runs here. Writes nothing.

    ConfigError with every fault of options, folder, data and weights; D2ScaleError under torchrun.
    """
    if under_torchrun():
        raise D2ScaleError("d2scale reproduce starts its own ranks: call it without torchrun")
    form = options.form or ("full" if torch.cuda.is_available() else "small")
    folder = Path(options.output_dir)
    faults: list[Fault] = []
    asked, machine, data = PUBLISHED, None, None
    with collecting(faults):
        asked = chosen(options.only)
    finished = tuple(one for one in EXPERIMENTS if is_finished(folder / one.folder))
    shown = [one for one in EXPERIMENTS if one in asked or one in finished]
    recipes = {experiment: experiment.recipe(form, options.third_method) for experiment in shown}
    cfgs = {experiment: load_cfg(recipe) for experiment, recipe in recipes.items()}
    if options.images_seen is not None:
        faults += length_faults(options.images_seen, list(cfgs.values()))
    with collecting(faults):
        machine = Machine.at_hand(form, options.num_gpus)
    with collecting(faults):
        data = whole_coco() if form == "full" else small_data(folder, options.images)
    settings = _settings(form, options, data)
    faults += _folder_faults(folder, settings)
    to_train = [cfgs[one] for one in asked if one not in finished]
    subset, training_images = _check_inputs(faults, data, to_train)
    if machine is None or data is None or faults:
        raise ConfigError(faults)
    planned = tuple(
        plan_experiment(experiment, recipe, folder, machine, options.images_seen)
        for experiment, recipe in recipes.items()
    )
    if faults := [fault for one in planned for fault in recipe_faults(one)]:
        raise ConfigError(faults)
    return Reproduction(
        folder, form, settings, machine, data, subset, training_images, planned, finished
    )


def _settings(form: str, options: ReproductionOptions, data: Data | None) -> dict[str, Any]:
    settings = {"--form": form, "--images-seen": options.images_seen}
    if form == "full":
        settings["--method3"] = options.third_method
    if data is not None:
        settings[ROOT_VARIABLE] = data.name
    return settings


def _folder_faults(folder: Path, settings: Mapping[str, Any]) -> list[Fault]:
    run_folders = [folder / experiment.folder for experiment in EXPERIMENTS]
    begun = any(run_folder.exists() for run_folder in run_folders)
    faults = folder_faults(folder, settings, begun=begun)
    for run_folder in (folder, *run_folders):
        with collecting(faults):
            refuse_locked(run_folder, key="--output-dir")
    return faults


def _check_inputs(
    faults: list[Fault], data: Data | None, recipes: Sequence[Any]
) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the annotations of a subset, and the number of training images of whole datasets."""
    if not recipes:
        return {}, 0
    # All recipes have the same weights and data.
    with collecting(faults):
        _load_weights(recipes[0])
    with collecting(faults):
        if data is not None and data.images is None:
            return {}, check_datasets(recipes[0]).images
        if data is not None:
            return read_subset(data), 0
    return {}, 0


def _load_weights(cfg: Any) -> None:
    """Load the initial weights once, on the CPU: a broken file should not wait for its turn."""
    if not cfg.MODEL.WEIGHTS:
        return
    find_weights(cfg.MODEL.WEIGHTS)
    # Each training logs what the file lacks.
    logging.disable(logging.WARNING)
    try:
        load_initial_weights(new_model(cfg), cfg.MODEL.WEIGHTS)
    finally:
        logging.disable(logging.NOTSET)
