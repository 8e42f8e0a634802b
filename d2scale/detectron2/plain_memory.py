"""The memory of a recipe that plain detectron2 trains: YAML or LazyConfig."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import DefaultTrainer
from omegaconf import DictConfig, ListConfig
from torch import nn

from d2scale.config.loading import flatten, load_yaml, parse_opts, recipe_from_settings
from d2scale.config.upstream import is_lazy_config
from d2scale.detectron2.checks import model_faults
from d2scale.detectron2.config import load_cfg
from d2scale.detectron2.datasets import register_datasets
from d2scale.detectron2.lazy_config import FOR_MEMORY, load_lazy_config, read_lazy_recipe
from d2scale.detectron2.memory import TrainingMemory, autocast_for
from d2scale.detectron2.own_datasets import own_dataset_faults
from d2scale.detectron2.step import build_step
from d2scale.detectron2.worst_batches import TrainingImages, missing_data
from d2scale.errors import ConfigError, Fault
from d2scale.planning.coverage import coverage, variant
from d2scale.planning.hardware import FRACTION
from d2scale.planning.memory_profile import MemoryProfile
from d2scale.step.norms import without_synchronised_norms
from d2scale.step.optimizer_step import OptimizerStep

ENGINE = "detectron2"
_SEM_SEG_IGNORE = 255


class PlainMemory(TrainingMemory):
    """How many images fit in a training of a detectron2 config.

    Args:
        cfg: detectron2's, with d2scale's keys, not scaled.
        model: see :class:`TrainingMemory`.
        trainer: builds model and optimizer: DefaultTrainer or a class derived from it.
        recipe: what ``load_recipe`` returns of the same recipe. A profile then names the recipe's
            settings alone, and holds for what ``d2scale plan`` reads. None: all of ``cfg``.
    """

    engine = ENGINE

    def __init__(
        self,
        cfg: Any,
        model: nn.Module | None = None,
        *,
        trainer: type[DefaultTrainer] = DefaultTrainer,
        recipe: tuple[Any, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(cfg, model)
        self._trainer = trainer
        self._recipe = recipe

    def covers(self, cfg: Any) -> dict[str, Any]:
        if self._recipe is None:
            return super().covers(cfg)
        return _covers(self._recipe, cfg)

    def build_step(self, cfg: Any, device: torch.device) -> OptimizerStep:
        own = cfg.clone()
        own.defrost()
        own.MODEL.DEVICE = str(device)
        model = self._trainer.build_model(own).train()
        optimizer = self._trainer.build_optimizer(own, model)
        return _step(cfg, model, optimizer, device)


class LazyMemory(TrainingMemory):
    """How many images fit in a training of a LazyConfig.

    Args:
        lazy: the LazyConfig, not scaled.
        recipe: what ``read_lazy_recipe`` returns of it.
        model: see :class:`TrainingMemory`.
    """

    engine = ENGINE

    def __init__(
        self, lazy: Any, recipe: tuple[Any, Mapping[str, Any]], model: nn.Module | None = None
    ) -> None:
        super().__init__(recipe[0], model)
        self._lazy = lazy
        self._recipe = recipe

    @property
    def model_name(self) -> str:
        return str(self._recipe[1].get("model._target_", "a model")).rpartition(".")[2]

    def images(self) -> TrainingImages:
        loader = self._lazy.dataloader.train
        names = str(loader.dataset.get("names", "dataloader.train.dataset"))
        with missing_data(names):
            entries = instantiate(loader.dataset)
        edges, longest = _resizing(loader.mapper)
        return TrainingImages(
            names,
            entries,
            lambda part: instantiate(_with_largest_size(loader.mapper, part)),
            short_edge=max(edges, default=0),
            max_size=max(longest, default=0),
            grouped=loader.get("aspect_ratio_grouping", True),
            ignore_value=_SEM_SEG_IGNORE,
        )

    def covers(self, cfg: Any) -> dict[str, Any]:
        return _covers(self._recipe, cfg)

    def build_step(self, cfg: Any, device: torch.device) -> OptimizerStep:
        model = instantiate(self._lazy.model).train()
        if device.type != "cpu":  # fake parameters cannot be moved
            model.to(device)
        node = copy.deepcopy(self._lazy.optimizer)
        node.params.model = model
        return _step(cfg, model, instantiate(node), device)


def make_profile(path: str, opts: Sequence[str], device: str) -> tuple[MemoryProfile, float]:
    """Return the profile of a recipe, and the part of a budget that a prediction may fill.

    Args:
        path: of a YAML recipe or a LazyConfig.
        opts: ``KEY VALUE`` pairs, of a LazyConfig ``key=value``.
        device: ``cpu`` predicts, ``cuda`` measures.

    Raises:
        ConfigError: with all faults of the recipe or the request.
    """
    if device == "cuda" and not torch.cuda.is_available():
        advice = "use --device cpu, which predicts without a GPU"
        raise ConfigError(
            [Fault("--device", "cuda", "cpu, for CUDA is not available here", advice)]
        )
    memory: TrainingMemory
    if is_lazy_config(path):
        lazy = load_lazy_config(path, opts)
        recipe, settings = read_lazy_recipe(lazy, FOR_MEMORY)
        recipe.MODEL.DEVICE = device
        memory = LazyMemory(lazy, (recipe, settings))
    else:
        cfg = load_cfg(path, opts)
        cfg.MODEL.DEVICE = device
        if faults := [*model_faults(cfg), *own_dataset_faults(cfg)]:
            raise ConfigError(faults)
        register_datasets(cfg)
        settings = {**dict(flatten(load_yaml(path))), **dict(parse_opts(opts))}
        recipe = recipe_from_settings(settings)
        memory = PlainMemory(cfg, recipe=(recipe, settings))
    fraction = float(recipe.D2SCALE.MEMORY.FRACTION)
    if faults := FRACTION.faults(fraction):
        raise ConfigError(faults)
    return memory.profile(), fraction


def _covers(recipe: tuple[Any, Mapping[str, Any]], cfg: Any) -> dict[str, Any]:
    return variant(coverage(*recipe, ENGINE), amp=cfg.SOLVER.AMP.ENABLED, checkpointing=False)


def _step(
    cfg: Any, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> OptimizerStep:
    # A rank that runs out of memory would leave the others waiting in a synchronised norm.
    without_synchronised_norms(model, "memory is being measured")
    precision, scaler = autocast_for(device, torch.float16 if cfg.SOLVER.AMP.ENABLED else None)
    return build_step(cfg, model, optimizer, precision=precision, scaler=scaler)


def _nodes(node: Any) -> list[Any]:
    """Return a LazyConfig's node and all those below it that are dictionaries."""
    below = node.values() if isinstance(node, DictConfig) else node
    below = below if isinstance(node, DictConfig | ListConfig) else ()  # a function
    found = [node] if isinstance(node, DictConfig) else []
    for entry in below:
        found += _nodes(entry) if isinstance(entry, DictConfig | ListConfig) else []
    return found


def _resizing(mapper: Any) -> tuple[list[int], list[int]]:
    """Return the short edges and longest sizes that the augmentations of a mapper resize to."""
    edges: list[int] = []
    longest: list[int] = []
    for node in _nodes(mapper):
        if "short_edge_length" in node:
            edges.append(_largest_edge(node))
            longest.append(node.get("max_size", 1 << 30))
    return edges, longest


def _largest_edge(node: Any) -> int:
    edges = node.short_edge_length
    return int(edges if isinstance(edges, int) else max(edges))


def _with_largest_size(mapper: Any, part: float) -> Any:
    """Return a copy of a mapper's node that resizes to ``part`` of the largest size.

    Before::

        L(T.ResizeShortestEdge)(short_edge_length=(640, 800), sample_style="choice", max_size=1333)

    After, for a part of 1::

        L(T.ResizeShortestEdge)(short_edge_length=(800, 800), sample_style="choice", max_size=1333)
    """
    largest = copy.deepcopy(mapper)
    for node in _nodes(largest):
        if "short_edge_length" in node:
            node.short_edge_length = (round(_largest_edge(node) * part),) * 2
        for key in ("max_size", "target_height", "target_width"):
            if key in node:
                node[key] = round(node[key] * part)
        # A part of the image stays one.
        if "crop_size" in node and min(node.crop_size) > 1:
            node.crop_size = tuple(round(edge * part) for edge in node.crop_size)
    return largest
