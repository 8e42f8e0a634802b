"""Optimizer, gradient clipping and learning-rate schedule, as detectron2 builds them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import nn

from d2scale.engine.honoured import ADAMW_NAMES
from d2scale.step.update import GradientClipper

_NORM_LAYERS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD or AdamW over the parameters of ``model`` that train."""
    groups = parameter_groups(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
    )
    if cfg.SOLVER.OPTIMIZER.lower() in ADAMW_NAMES:
        return torch.optim.AdamW(
            groups,
            lr=cfg.SOLVER.BASE_LR,
            betas=tuple(cfg.SOLVER.BETAS),
            eps=cfg.SOLVER.EPS,
            fused=True,
        )
    return torch.optim.SGD(
        groups,
        lr=cfg.SOLVER.BASE_LR,
        momentum=cfg.SOLVER.MOMENTUM,
        nesterov=cfg.SOLVER.NESTEROV,
        fused=True,
    )


def parameter_groups(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float | None = None,
    weight_decay_bias: float | None = None,
    bias_lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Group the parameters that train by learning rate and weight decay.

    A shared parameter counts once, in the first module that holds it. A bias takes the bias
    settings also inside a normalization layer.

    Args:
        model: its parameters with ``requires_grad`` are grouped.
        base_lr: learning rate of everything but biases.
        weight_decay: of everything that is not named below.
        weight_decay_norm: of normalization layers; None: ``weight_decay``.
        weight_decay_bias: of biases; None: as the layer's other parameters.
        bias_lr_factor: learning rate of biases over ``base_lr``.

    Returns:
        As few groups as possible, in the order in which the model names them.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            learning_rate, decay = base_lr, weight_decay
            if isinstance(module, _NORM_LAYERS) and weight_decay_norm is not None:
                decay = weight_decay_norm
            if name == "bias":
                learning_rate = base_lr * bias_lr_factor
                decay = decay if weight_decay_bias is None else weight_decay_bias
            groups.setdefault((learning_rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate, "weight_decay": decay}
        for (learning_rate, decay), parameters in groups.items()
    ]


def build_gradient_clipper(cfg: CfgNode) -> GradientClipper | None:
    """Return what ``SOLVER.CLIP_GRADIENTS`` asks for; None: nothing.

    ``value`` and ``norm`` clip each parameter for itself, as detectron2 does; ``full_model``
    clips the norm over all parameters, as d2go does.
    """
    settings = cfg.SOLVER.CLIP_GRADIENTS
    if not settings.ENABLED:
        return None
    limit, norm_type, kind = settings.CLIP_VALUE, settings.NORM_TYPE, settings.CLIP_TYPE

    def clip(parameters: Iterable[nn.Parameter]) -> None:
        if kind == "full_model":
            nn.utils.clip_grad_norm_(parameters, limit, norm_type)
            return
        for parameter in parameters:
            if kind == "norm":
                nn.utils.clip_grad_norm_(parameter, limit, norm_type)
            else:
                nn.utils.clip_grad_value_(parameter, limit)

    return clip


class LearningRateSchedule:
    """The learning rate of every parameter group as a function of the iteration alone.

    It keeps no state, so a resumed run needs only the iteration.

    Args:
        optimizer: its groups' learning rates now are those that the multiplier multiplies.
        multiplier: progress in [0, 1) to a factor.
        max_iter: iterations of the whole training.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, multiplier: ParamScheduler, max_iter: int
    ) -> None:
        self._optimizer = optimizer
        self._multiplier = multiplier
        self._max_iter = max_iter
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        self._shown_group = sizes.index(max(sizes))

    def set(self, iteration: int) -> float:
        """Set the learning rates for ``iteration`` and return that of the largest group."""
        factor = self._multiplier(iteration / self._max_iter)
        for group, base_lr in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base_lr * factor
        return self._base_lrs[self._shown_group] * factor


def build_lr_schedule(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LearningRateSchedule:
    """Return ``SOLVER.LR_SCHEDULER_NAME`` with its warm-up."""
    max_iter = cfg.SOLVER.MAX_ITER
    main: ParamScheduler
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR":
        main = CosineParamScheduler(1.0, cfg.SOLVER.BASE_LR_END / cfg.SOLVER.BASE_LR)
    else:
        steps = list(cfg.SOLVER.STEPS)
        values = [cfg.SOLVER.GAMMA**drops for drops in range(len(steps) + 1)]
        main = MultiStepParamScheduler(values, num_updates=max_iter, milestones=steps)
    multiplier = with_warmup(
        main,
        factor=cfg.SOLVER.WARMUP_FACTOR,
        length=min(cfg.SOLVER.WARMUP_ITERS / max_iter, 1.0),
        method=cfg.SOLVER.WARMUP_METHOD,
        rescale_interval=cfg.SOLVER.RESCALE_INTERVAL,
    )
    return LearningRateSchedule(optimizer, multiplier, max_iter)


def with_warmup(
    main: ParamScheduler,
    *,
    factor: float,
    length: float,
    method: str,
    rescale_interval: bool,
) -> ParamScheduler:
    """Put a warm-up before ``main``.

    Args:
        main: the schedule that follows.
        factor: where warm-up begins, over the first value of ``main``.
        length: part of the training in [0, 1] that warm-up takes.
        method: ``linear`` or ``constant``.
        rescale_interval: whether ``main`` begins after the warm-up and is pressed into the
            rest; otherwise warm-up hides its beginning.
    """
    begin = factor * main(0.0)
    warmup: ParamScheduler
    if method == "constant":
        warmup = ConstantParamScheduler(begin)
    else:
        warmup = LinearParamScheduler(begin, main(0.0 if rescale_interval else length))
    return CompositeParamScheduler(
        [warmup, main],
        interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
        lengths=[length, 1 - length],
    )
