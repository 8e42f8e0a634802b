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
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm),
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD or AdamW over the parameters of ``model`` that train."""
    solver = cfg.SOLVER
    groups = parameter_groups(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
    )
    options = {"lr": solver.BASE_LR, "fused": True}
    if solver.OPTIMIZER.lower() in ADAMW_NAMES:
        return torch.optim.AdamW(groups, betas=tuple(solver.BETAS), eps=solver.EPS, **options)
    return torch.optim.SGD(groups, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **options)


def parameter_groups(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float | None = None,
    weight_decay_bias: float | None = None,
    bias_lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Return as few groups as possible of the parameters that train, in the model's order.

    A shared parameter counts once, in the first module that holds it. A bias takes the bias
    settings also inside a normalization layer. None for the decay of normalization layers means
    ``weight_decay``, for that of biases the decay of the layer's other parameters.
    ``bias_lr_factor`` is the learning rate of biases over ``base_lr``.
    """
    norm_decay = weight_decay if weight_decay_norm is None else weight_decay_norm
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    grouped: set[nn.Parameter] = set()
    for module in model.modules():
        layer_decay = norm_decay if isinstance(module, _NORM_LAYERS) else weight_decay
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in grouped:
                continue
            grouped.add(parameter)
            key = (base_lr, layer_decay)
            if name == "bias":
                decay = layer_decay if weight_decay_bias is None else weight_decay_bias
                key = (base_lr * bias_lr_factor, decay)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
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
    """The learning rate of every parameter group as a function of the iteration, times a gain.

    It keeps no state, so a resumed run needs only the iteration. ``multiplier`` maps progress in
    [0, 1) to a factor of the learning rates that the groups of ``optimizer`` have now.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, multiplier: ParamScheduler, max_iter: int
    ) -> None:
        # Not its groups: loading a state makes new ones.
        self._optimizer = optimizer
        self._multiplier = multiplier
        self._max_iter = max_iter
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]

    def set(self, iteration: float, gain: float = 1.0) -> float:
        """Set the learning rates to ``gain`` times those of ``iteration``.

        Returned is the rate of the largest group.
        """
        factor = self._multiplier(iteration / self._max_iter) * gain
        groups = self._optimizer.param_groups
        for group, base_lr in zip(groups, self._base_lrs, strict=True):
            group["lr"] = base_lr * factor
        return float(max(groups, key=lambda group: len(group["params"]))["lr"])


def build_lr_schedule(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LearningRateSchedule:
    """Return ``SOLVER.LR_SCHEDULER_NAME`` with its warm-up."""
    solver = cfg.SOLVER
    main: ParamScheduler
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        main = CosineParamScheduler(1.0, solver.BASE_LR_END / solver.BASE_LR)
    else:
        values = [solver.GAMMA**drops for drops in range(len(solver.STEPS) + 1)]
        main = MultiStepParamScheduler(values, solver.MAX_ITER, milestones=list(solver.STEPS))
    multiplier = with_warmup(
        main,
        factor=solver.WARMUP_FACTOR,
        length=min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        method=solver.WARMUP_METHOD,
        rescale_interval=solver.RESCALE_INTERVAL,
    )
    return LearningRateSchedule(optimizer, multiplier, solver.MAX_ITER)


def with_warmup(
    main: ParamScheduler,
    *,
    factor: float,
    length: float,
    method: str,
    rescale_interval: bool,
) -> ParamScheduler:
    """Return ``main`` with a ``linear`` or ``constant`` warm-up before it.

    The warm-up begins at ``factor`` times the first value of ``main`` and takes ``length``, a part
    of the training in [0, 1]. With ``rescale_interval`` ``main`` begins after it and is
    compressed into the rest; otherwise the warm-up hides its beginning.
    """
    begin = factor * main(0.0)
    warmup: ParamScheduler = ConstantParamScheduler(begin)
    if method == "linear":
        warmup = LinearParamScheduler(begin, main(0.0 if rescale_interval else length))
    return CompositeParamScheduler(
        [warmup, main],
        interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
        lengths=[length, 1 - length],
    )
