"""What numbers a GPU computes with: TF32 in the place of float32, bfloat16 if it has that."""

from __future__ import annotations

from typing import Any

import torch

from d2scale.errors import Fault

# The first generation (compute capability) with TF32 and bfloat16: Ampere.
_AMPERE = 8


def tf32_use(capability: int) -> str:
    """Return which operations on float32 a GPU rounds to TF32, 10 bits of mantissa, in words.

    ``capability`` is the first number of the GPU's compute capability. torch allows it for
    convolutions unless somebody forbids it, so "float32" is not the same on all GPUs.
    """
    allowed = {"convolutions": _allowed("cudnn.conv"), "matrix products": _allowed("cuda.matmul")}
    used = [name for name, is_allowed in allowed.items() if is_allowed and capability >= _AMPERE]
    return ", ".join(used) or "nothing"


def _allowed(name: str) -> bool:
    backend, _, operation = name.partition(".")
    module: Any = getattr(torch.backends, backend)
    flags: Any = getattr(module, operation, None)
    if hasattr(flags, "fp32_precision"):  # from torch 2.9 on, which may refuse to tell the older
        return bool(flags.fp32_precision == "tf32")
    return bool((flags or module).allow_tf32)


def bfloat16_faults(cfg: Any) -> list[Fault]:
    """Return what is wrong with ``SOLVER.AMP`` of a config on the GPUs of this machine."""
    key, amp = "SOLVER.AMP.PRECISION", cfg.SOLVER.AMP
    on_cuda = cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available()
    # detectron2 alone has no such key, and no bfloat16.
    if not (amp.ENABLED and on_cuda and amp.get("PRECISION") == "bfloat16") or torch.version.hip:
        return []
    old = [
        torch.cuda.get_device_name(index)
        for index in range(torch.cuda.device_count())
        if torch.cuda.get_device_capability(index)[0] < _AMPERE
    ]
    if not old:
        return []
    allowed = f"float16 on {old[0]}, which has no bfloat16"
    return [Fault(key, "bfloat16", allowed, "set it to float16, or SOLVER.AMP.ENABLED to False")]
