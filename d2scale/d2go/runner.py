"""``d2go.train_net --runner d2scale.Runner``: d2go's own training, on the hardware at hand."""

from __future__ import annotations

import logging
from collections import OrderedDict
from importlib.metadata import entry_points
from typing import Any

import detectron2.utils.comm as comm
import torch
from d2go.runner import GeneralizedRCNNRunner
from d2go.trainer.api import TestNetOutput, TrainNetOutput

from d2scale.config.defaults import add_d2scale_config
from d2scale.d2go.config import CfgNode, exit_on_user_error
from d2scale.d2go.datasets import register_datasets
from d2scale.d2go.memory import check_memory
from d2scale.d2go.micro_batches import MicroBatches
from d2scale.d2go.progress import ProgressRecord, resume_by_images
from d2scale.d2go.scaling_methods import applied_plan, names_own_method, scale_in_place
from d2scale.errors import ConfigError
from d2scale.planning.methods import method_of
from d2scale.planning.progress import RECORD, recipe_of
from d2scale.planning.schedule import schedule_faults

logger = logging.getLogger(__name__)


class Runner(GeneralizedRCNNRunner):
    """A d2go runner that knows d2scale's config keys, methods, models and datasets.

    ``SOLVER.AUTO_SCALING_METHODS: [d2scale_keep_total]`` (or another method) in a config chooses
    how it is scaled. The method takes effect on any world size, the recipe's own included, and
    once. A training resumes at the image where it stopped, whatever the world size.
    """

    _recipe: dict[str, Any] | None = None

    @classmethod
    def get_default_cfg(cls) -> CfgNode:
        """Return d2go's defaults with the keys of d2scale and of its projects."""
        cfg = CfgNode.cast_from_other_class(super().get_default_cfg())
        add_d2scale_config(cfg)
        for entry in entry_points(group="d2scale.configs"):
            entry.load()(cfg)
        return cfg

    @classmethod
    def create_shared_context(cls, cfg: Any) -> None:
        """Check the recipe before processes are launched; d2go calls this in the parent."""
        # The parent reads every rank's result by torch.load, which since torch 2.6 refuses
        # classes it was not told of.
        torch.serialization.add_safe_globals([TrainNetOutput, TestNetOutput, OrderedDict])
        with exit_on_user_error():
            if names_own_method(cfg):
                method_of(cfg.SOLVER.AUTO_SCALING_METHODS)
                faults = schedule_faults(cfg)
                if faults:
                    raise ConfigError(faults)
                check_memory(cfg)

    def register(self, cfg: Any) -> None:
        """Register what a config may name: datasets and the projects' models."""
        super().register(cfg)
        # d2go registers before it scales the config in place.
        self._recipe = recipe_of(cfg)
        with exit_on_user_error():
            register_datasets(cfg)
        for entry in entry_points(group="d2scale.detectron2"):
            entry.load()()

    def build_checkpointer(self, cfg: Any, model: Any, save_dir: str, **kwargs: Any) -> Any:
        """Return d2go's checkpointer; in training it also keeps, and resumes by, a record."""
        if "optimizer" not in kwargs or "scheduler" not in kwargs:
            return super().build_checkpointer(cfg, model, save_dir, **kwargs)
        progress = ProgressRecord(cfg, self._recipe)
        checkpointer = super().build_checkpointer(
            cfg, model, save_dir, **{RECORD: progress}, **kwargs
        )
        resume_by_images(
            checkpointer, progress, kwargs["optimizer"], kwargs["scheduler"], cfg.SOLVER.MAX_ITER
        )
        return checkpointer

    def build_model(self, cfg: Any, eval_only: bool = False) -> torch.nn.Module:
        """Build the model that the config names; a config it cannot have is a user's mistake."""
        with exit_on_user_error():
            return super().build_model(cfg, eval_only)

    def _get_trainer_hooks(
        self,
        cfg: Any,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        periodic_checkpointer: Any,
        trainer: Any,
    ) -> list[Any]:
        """Return d2go's hooks, and the one that takes steps in micro-batches."""
        hooks = super()._get_trainer_hooks(
            cfg, model, optimizer, scheduler, periodic_checkpointer, trainer
        )
        return [*hooks, MicroBatches(cfg, periodic_checkpointer.checkpointer)]

    def do_train(self, cfg: Any, model: torch.nn.Module, resume: bool) -> Any:
        """Scale the config if d2go has not had to, then train as d2go does."""
        # d2go calls a scaling method only when the world size differs from the recipe's.
        if names_own_method(cfg) and applied_plan(cfg) is None:
            with exit_on_user_error(on_all_ranks=True):
                method = method_of(cfg.SOLVER.AUTO_SCALING_METHODS)
                scale_in_place(cfg, comm.get_world_size(), method)
        return super().do_train(cfg, model, resume)
