"""Batch norm layers that train: which couple the images of a batch, which communicate."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from d2scale.step import ranks
from d2scale.step.private_torch import BATCH_NORM, share_tensors

logger = logging.getLogger(__name__)

# detectron2's own and mobile-vision's; d2go's default for training on several GPUs. Their plain
# forms.
_NAIVE_SYNC_BATCH_NORMS = {
    "NaiveSyncBatchNorm": nn.BatchNorm2d,
    "NaiveSyncBatchNorm1d": nn.BatchNorm1d,
    "NaiveSyncBatchNorm3d": nn.BatchNorm3d,
}


def trained_norms(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the batch norm layers that take statistics from their batch."""
    norms = ((name, m) for name, m in model.named_modules() if isinstance(m, BATCH_NORM))
    return tuple(name for name, norm in norms if norm.training)


def synchronised_norms(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the batch norm layers that communicate in their forward."""
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.SyncBatchNorm) or type(module).__name__ in _NAIVE_SYNC_BATCH_NORMS
    )


def plain_norms(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the batch norm layers that train, each rank by itself."""
    synchronised = synchronised_norms(model)
    return tuple(name for name in trained_norms(model) if name not in synchronised)


def synchronise_norms(model: nn.Module, synchronised: bool) -> nn.Module:
    """Let batch norm that trains take its statistics from all ranks, or from none but its own.

    In place, with the very parameters and buffers. CUDA has torch's layer, which refuses tensors of
    the host; there the layer is a :class:`HostSyncBatchNorm`. detectron2's own stays, where it is.
    """
    if not synchronised:
        one_rank = ranks.world_size() == 1
        reason = "there is one rank" if one_rank else "the plan does not synchronise them"
        return without_synchronised_norms(model, reason)
    on_cuda = next(model.parameters()).is_cuda
    names = plain_norms(model)
    if not on_cuda:
        torchs = (n for n, m in model.named_modules() if type(m) is nn.SyncBatchNorm)
        names = (*names, *torchs)
    for name in names:
        norm = model.get_submodule(name)
        convert = nn.SyncBatchNorm.convert_sync_batchnorm if on_cuda else HostSyncBatchNorm.of
        _replace(model, name, convert(norm))
    if names:
        logger.info(
            "%d batch norm layers (the first is %s) take their statistics from %d ranks",
            *(len(names), names[0], ranks.world_size()),
        )
    return model


def without_synchronised_norms(model: nn.Module, reason: str = "there is one rank") -> nn.Module:
    """Replace synchronised batch norm by plain batch norm, in place, and log the ``reason``."""
    if names := synchronised_norms(model):
        logger.info(
            "%d synchronised batch norm layers become plain ones, for %s (the first is %s)",
            *(len(names), reason, names[0]),
        )
    for name in names:
        norm = model.get_submodule(name)
        plain = _NAIVE_SYNC_BATCH_NORMS.get(type(norm).__name__, nn.BatchNorm2d)
        _replace(model, name, _like(norm, plain))
    return model


class HostSyncBatchNorm(nn.SyncBatchNorm):
    """Synchronised batch norm for tensors of the host, with torch's parameters and buffers.

    Ranks may have different numbers of images. Mean and variance are two sums, one after the
    other: the mean of squares less the square of the mean loses digits.
    """

    @classmethod
    def of(cls, norm: nn.Module) -> nn.Module:
        """Return the layer with the very parameters and buffers of ``norm``."""
        return _like(norm, cls)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (n, channels, ...), with the statistics of all ranks' images in training."""
        if not self.training or ranks.world_size() == 1:
            return BATCH_NORM.forward(self, x)
        self._check_input_dim(x)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        values = x if x.dtype == torch.float64 else x.float()  # under autocast x may be of 16 bits
        count = values.new_tensor([x.numel() / x.shape[1]])
        sums = _SumOverRanks.apply(torch.cat([values.sum(axes), count]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        centred = values - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(axes)) / count
        self._track(mean, variance * (count / (count - 1)))
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Let the running statistics follow, as torch's layers do."""
        if self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None  # torch keeps all three, or none
            running.lerp_(value.to(running), momentum)


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return ranks.sum_over_ranks(own.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return ranks.sum_over_ranks(gradient.clone())


def _like(norm: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return a layer of ``kind`` that is and has what ``norm`` is and has."""
    assert isinstance(norm, BATCH_NORM)
    settings = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    other = kind(*settings)
    share_tensors(other, norm)  # an optimizer may hold them
    return other.train(norm.training)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(owner), own_name, module)
