"""Batch norm layers that train: which couple the images of a batch, which communicate."""

from __future__ import annotations

import logging

from torch import nn

from d2scale.step.private_torch import BATCH_NORM, share_tensors

logger = logging.getLogger(__name__)

# detectron2's own; d2go's default for training on several GPUs.
_NAIVE_SYNC_BATCH_NORM = "NaiveSyncBatchNorm"


def trained_norms(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the batch norm layers that take statistics from their batch."""
    norms = ((name, m) for name, m in model.named_modules() if isinstance(m, BATCH_NORM))
    return tuple(name for name, norm in norms if norm.training)


def synchronised_norms(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the batch norm layers that communicate in their forward."""
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.SyncBatchNorm) or type(module).__name__ == _NAIVE_SYNC_BATCH_NORM
    )


def without_synchronised_norms(model: nn.Module, reason: str = "there is one rank") -> nn.Module:
    """Replace synchronised batch norm by plain batch norm, in place, and log the ``reason``."""
    if names := synchronised_norms(model):
        logger.info(
            "%d synchronised batch norm layers become plain ones, for %s (the first is %s)",
            *(len(names), reason, names[0]),
        )
    for name in names:
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, _plain_norm(model.get_submodule(name)))
    return model


def _plain_norm(norm: nn.Module) -> nn.BatchNorm2d:
    assert isinstance(norm, BATCH_NORM)
    settings = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    plain = nn.BatchNorm2d(*settings)
    share_tensors(plain, norm)  # an optimizer may hold them
    return plain.train(norm.training)
