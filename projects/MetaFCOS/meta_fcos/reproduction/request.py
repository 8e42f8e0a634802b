"""What a user asks of ``d2scale reproduce``, checked on this machine, and decided."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from d2scale.coco.catalog import ROOT_VARIABLE
from d2scale.coco.dataset import check_datasets
from d2scale.config import load_cfg
from d2scale.engine.checkpoint.weights import find_weights
from d2scale.engine.launch import under_torchrun
from d2scale.engine.models import load_initial_weights, new_model
from d2scale.errors import ConfigError, D2ScaleError, Fault
from d2scale.run_folder.lock import refuse_locked
from meta_fcos.reproduction.data import (
    TRAIN_IMAGES,
    VAL_IMAGES,
    Data,
    read_subset,
    small_data,
    whole_coco,
)
from meta_fcos.reproduction.experiments import (
    EXPERIMENTS,
    FORMS,
    THIRD_METHODS,
    chosen,
    length_faults,
)
from meta_fcos.reproduction.folder import folder_faults
from meta_fcos.reproduction.runs import Machine, Run, decide, is_finished, recipe_faults

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        output_dir: gets a run folder for each experiment, and the report.
        form: ``full``, ``small``, or None: full on a machine with a GPU.
        images_seen: images that each training shows; None: its recipe's.
        num_gpus: see :meth:`~meta_fcos.reproduction.runs.Machine.at_hand`.
        only: numbers of experiments; all, if empty.
        third_method: ``published`` or ``exact``, see
            :meth:`~meta_fcos.reproduction.experiments.Experiment.recipe`.
        images: of training and validation in the small form.
    """

    output_dir: str
    form: str | None = None
    images_seen: int | None = None
    num_gpus: int | None = None
    only: tuple[int, ...] = ()
    third_method: str = THIRD_METHODS[0]
    images: tuple[int, int] = (TRAIN_IMAGES, VAL_IMAGES)


@dataclass(frozen=True)
class Decision:
    """A request that can be met.

    Attributes:
        folder: of everything that is written.
        form: ``full`` or ``small``.
        settings: what must stay until the end, by the option that chooses it.
        machine: this one.
        data: what is trained on.
        subset: its annotations, where COCO is cut.
        training_images: that have boxes; 0 where it was not counted.
        runs: the experiments that are asked for or finished, in the published order.
        asked: numbers of the former.
    """

    folder: Path
    form: str
    settings: Mapping[str, Any]
    machine: Machine
    data: Data
    subset: Mapping[str, Mapping[str, Any]]
    training_images: int
    runs: tuple[Run, ...]
    asked: frozenset[int]

    def to_train(self) -> tuple[Run, ...]:
        """Return the runs that are asked for and not finished."""
        asked = (run for run in self.runs if run.experiment.number in self.asked)
        return tuple(run for run in asked if not is_finished(run.folder))

    def finished(self) -> tuple[Run, ...]:
        """Return the runs that a report can show."""
        return tuple(run for run in self.runs if is_finished(run.folder))


class _Faults:
    """Faults from several checks, to be told together."""

    def __init__(self) -> None:
        self._found: dict[str, Fault] = {}

    def add(self, faults: Iterable[Fault]) -> None:
        self._found.update({str(fault): fault for fault in faults})

    def of(self, check: Callable[[], T], otherwise: T) -> T:
        """Return what ``check`` returns, or note why it cannot."""
        try:
            return check()
        except ConfigError as error:
            self.add(error.faults)
            return otherwise

    def tell(self) -> None:
        if self._found:
            raise ConfigError(list(self._found.values()))


def decide_all(request: Request) -> Decision:
    """Check a request, and decide how each experiment runs here. Writes nothing.

    Raises:
        ConfigError: with every fault of request, folder, data and weights.
        D2ScaleError: under torchrun.
    """
    if under_torchrun():
        raise D2ScaleError("d2scale reproduce starts its own ranks: call it without torchrun")
    form = request.form or ("full" if torch.cuda.is_available() else "small")
    _check_words(form, request.third_method)
    folder = Path(request.output_dir)
    faults = _Faults()
    experiments = faults.of(partial(chosen, request.only), EXPERIMENTS)
    asked = frozenset(each.number for each in experiments)
    known = [e for e in EXPERIMENTS if e.number in asked or is_finished(folder / e.folder)]
    recipes = {each: each.recipe(form, request.third_method) for each in known}
    left = [recipes[each] for each in experiments if not is_finished(folder / each.folder)]
    if request.images_seen is not None:
        cfgs = list(map(load_cfg, recipes.values()))
        faults.add(length_faults(request.images_seen, cfgs))
    machine = faults.of(partial(Machine.at_hand, form, request.num_gpus), None)
    data = faults.of(partial(_find_data, form, request), None)
    settings = _settings(form, request, data)
    faults.add(_folder_faults(folder, settings))
    subset, training_images = _check_inputs(faults, data, list(map(load_cfg, left)))
    faults.tell()
    assert machine is not None
    assert data is not None
    runs = tuple(
        decide(each, recipe, folder, machine, request.images_seen)
        for each, recipe in recipes.items()
    )
    for run in runs:
        faults.add(faults.of(partial(recipe_faults, run), []))
    faults.tell()
    return Decision(folder, form, settings, machine, data, subset, training_images, runs, asked)


def _check_words(form: str, third_method: str) -> None:
    words = (("--form", form, FORMS), ("--method3", third_method, THIRD_METHODS))
    faults = [
        Fault(option, word, " or ".join(allowed), "choose one")
        for option, word, allowed in words
        if word not in allowed
    ]
    if faults:
        raise ConfigError(faults)


def _find_data(form: str, request: Request) -> Data:
    if form == "full":
        return whole_coco()
    return small_data(Path(request.output_dir), request.images)


def _settings(form: str, request: Request, data: Data | None) -> dict[str, Any]:
    settings = {"--form": form, "--images-seen": request.images_seen}
    if form == "full":
        settings["--method3"] = request.third_method
    if data is not None:
        settings[ROOT_VARIABLE] = data.name
    return settings


def _folder_faults(folder: Path, settings: Mapping[str, Any]) -> list[Fault]:
    begun = any((folder / each.folder).exists() for each in EXPERIMENTS)
    found = folder_faults(folder, settings, begun=begun)
    for each in EXPERIMENTS:
        try:
            refuse_locked(folder / each.folder)
        except ConfigError as error:
            found += error.faults
    return found


def _check_inputs(
    faults: _Faults, data: Data | None, recipes: Sequence[Any]
) -> tuple[dict[str, dict[str, Any]], int]:
    """Read what the recipes that are left to train will read.

    They share their model, but for the form, and their datasets.

    Returns:
        The annotations of a subset, and the number of training images of whole datasets.
    """
    if recipes:
        faults.of(partial(_load_weights, recipes[0]), None)
    if data is None or not recipes:
        return {}, 0
    if data.images is not None:
        return faults.of(partial(read_subset, data), {}), 0
    return {}, faults.of(partial(check_datasets, recipes[0]), 0)


def _load_weights(cfg: Any) -> None:
    """Load the initial weights once, on the CPU: a broken file shall not wait for its turn."""
    if not cfg.MODEL.WEIGHTS:
        return
    find_weights(cfg.MODEL.WEIGHTS)
    # What the file lacks is told by the trainings.
    logging.disable(logging.WARNING)
    try:
        load_initial_weights(new_model(cfg), cfg.MODEL.WEIGHTS)
    finally:
        logging.disable(logging.NOTSET)
