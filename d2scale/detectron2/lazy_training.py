"""Training and evaluating a LazyConfig, as detectron2's ``lazyconfig_train_net.py`` does."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from omegaconf import OmegaConf
from torch import nn

from d2scale.detectron2.data.patient import LOADER_SECONDS, patient
from d2scale.detectron2.data.readable import tell_unreadable_images
from d2scale.detectron2.training import Scaling
from d2scale.detectron2.user_errors import faults_of_building
from d2scale.run_folder.files import CONFIG_FILE
from d2scale.step import ranks


def train_lazy(scaling: Scaling, *, resume: bool) -> Mapping[str, Any]:
    """Train the LazyConfig of ``scaling``; return what its evaluator found last, if it has one."""
    cfg = scaling.cfg
    model = build_model(cfg)
    kind = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    trainer = kind(model, build_train_loader(cfg), build_optimizer(cfg, model))
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    results: dict[str, Any] = {}

    def evaluate() -> Any:
        results.update(evaluate_lazy(cfg, model))
        return dict(results)

    first = ranks.rank() == 0
    saving = hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if first else None
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=_build(cfg, "lr_multiplier")),
            saving,
            hooks.EvalHook(cfg.train.eval_period, evaluate),
            _writers(cfg) if first else None,
        ]
    )
    scaling.take_steps(trainer, checkpointer)
    checkpointer.resume_or_load(cfg.train.get("init_checkpoint"), resume=resume)
    resumes = resume and checkpointer.has_checkpoint()
    if first:
        LazyConfig.save(cfg, str(Path(cfg.train.output_dir, CONFIG_FILE)))
    trainer.train(trainer.iter + 1 if resumes else 0, cfg.train.max_iter)
    return results


def build_model(cfg: Any) -> nn.Module:
    """Return the model of a LazyConfig on its device."""
    model: nn.Module = _build(cfg, "model")
    return model.to(cfg.train.device)


def build_optimizer(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a LazyConfig for the parameters of ``model``."""
    node = copy.deepcopy(cfg.optimizer)
    node.params.model = model
    optimizer: torch.optim.Optimizer = _build(cfg, "optimizer", node)
    return optimizer


def build_train_loader(cfg: Any) -> Any:
    """Return the training loader of a LazyConfig, whose batches are made anew."""
    node = copy.deepcopy(cfg.dataloader.train)
    world_size = ranks.world_size()
    # detectron2 builds none that every process cannot share evenly.
    node.total_batch_size = -(-node.total_batch_size // world_size) * world_size
    return _build(cfg, "dataloader.train", node)


def evaluate_lazy(cfg: Any, model: nn.Module) -> dict[str, Any]:
    """Return the metrics of a LazyConfig's test set, none without an evaluator."""
    if "evaluator" not in cfg.dataloader:
        return {}
    loader, evaluator = _build(cfg, "dataloader.test"), _build(cfg, "dataloader.evaluator")
    loader = patient(tell_unreadable_images(loader), LOADER_SECONDS)
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results)
    return dict(results)


def _build(cfg: Any, key: str, node: Any = None) -> Any:
    """Return what a LazyConfig's node at ``key``, or ``node`` in its place, builds."""
    node = OmegaConf.select(cfg, key) if node is None else node
    with faults_of_building(key, str(node.get("_target_", ""))):
        return instantiate(node)


def _writers(cfg: Any) -> hooks.PeriodicWriter:
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
    return hooks.PeriodicWriter(writers, period=cfg.train.log_period)
