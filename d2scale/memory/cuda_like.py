"""Making steps on a CPU, real or fake, allocate what they allocate on a CUDA device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from d2scale.step.private_torch import run_backward, tree_map_only

# What autocast runs in float32 on CUDA, and in the half precision of its input on a CPU.
# https://pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float32
_FLOAT32_FUNCTIONS = frozenset(
    [
        *("__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "cosh", "cumprod"),
        *("binary_cross_entropy_with_logits", "cosine_similarity", "cumsum", "dist", "erfinv"),
        *("exp", "expm1", "group_norm", "huber_loss", "kl_div", "l1_loss", "layer_norm", "log"),
        *("log10", "log1p", "log2", "log_softmax", "logsumexp", "mse_loss", "nll_loss", "norm"),
        *("normalize", "pow", "prod", "reciprocal", "renorm", "rsqrt", "sinh", "smooth_l1_loss"),
        *("soft_margin_loss", "softmax", "softmin", "softplus", "sum", "tan"),
    ]
)

# Fused updates write in place and allocate nothing. Fake tensors have no rule for them: they would
# run on real memory, allocated for that.
_FUSED_UPDATES = frozenset(["_fused_adam_", "_fused_adamw_", "_fused_sgd_"])


class CudaLike(TorchFunctionMode):
    """Makes CUDA's choices on the CPU.

    Under autocast, what CUDA computes in float32 is computed in float32. The memory format
    ``channels_last``, which code chooses for a CPU's speed, is ignored.

    Args:
        fake: whether tensors are fake; fused updates of the weights are skipped then.
    """

    def __init__(self, *, fake: bool) -> None:
        super().__init__()
        self._fake = fake

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.backward:
            # A mode is off while it handles a call, but activation checkpointing runs forwards in
            # the backward pass. Not Tensor.backward itself, which would come here again.
            with self:
                return run_backward(*args)
        if kwargs.get("memory_format") is torch.channels_last:
            del kwargs["memory_format"]
        name = getattr(func, "__name__", "")
        if self._fake and name in _FUSED_UPDATES:
            return None
        if name in _FLOAT32_FUNCTIONS and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _to_float32, (args, kwargs))
        return func(*args, **kwargs)


def _to_float32(tensor: Tensor) -> Tensor:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if half else tensor
