"""Telling an out-of-memory error from every other error."""

from __future__ import annotations

import torch

# torch 2.4 has it only under torch.cuda.
OutOfMemoryError: type[RuntimeError] = getattr(
    torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError
)

# What libraries below torch say, in the words of their RuntimeErrors.
_SIGNS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    # cuDNN found no room for the workspace of any of its algorithms.
    "unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether ``error`` says that a device, or the machine, ran out of memory."""
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
