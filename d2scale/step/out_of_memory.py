"""The test whether an error is one of memory."""

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
    "CUFFT_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "miopenStatusAllocFailed",
    "DefaultCPUAllocator: can't allocate memory",
    # cuDNN found no room for the workspace of any of its algorithms.
    "unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm",
)
# The same libraries, where a handle or a workspace may have found no memory, or something else
# went wrong: it counts only on a device that is nearly full.
_SIGNS_IF_FULL = (
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
)
_NEARLY_FULL_BYTES = 256 * 2**20


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that a device, or the machine, ran out of memory."""
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if any(sign in text for sign in _SIGNS):
        return True
    return any(sign in text for sign in _SIGNS_IF_FULL) and _device_is_nearly_full()


def _device_is_nearly_full() -> bool:
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < _NEARLY_FULL_BYTES
