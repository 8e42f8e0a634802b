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
    "std::bad_alloc",
    # cuDNN found no room for the workspace of any of its algorithms.
    "unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm",
)
# Libraries that say no more than that something failed: it counts only where memory is nearly full.
_SIGNS_IF_DEVICE_IS_FULL = tuple(
    f"{library}_STATUS_{failure}"
    for library in ("CUBLAS", "CUDNN")
    for failure in ("NOT_INITIALIZED", "EXECUTION_FAILED", "INTERNAL_ERROR")
)
# Of oneDNN.
_SIGNS_IF_HOST_IS_FULL = ("could not create a primitive", "could not create a memory object")
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
    if any(sign in text for sign in _SIGNS_IF_DEVICE_IS_FULL):
        return _device_is_nearly_full()
    return any(sign in text for sign in _SIGNS_IF_HOST_IS_FULL) and _host_is_nearly_full()


def _device_is_nearly_full() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        return torch.cuda.mem_get_info()[0] < _NEARLY_FULL_BYTES
    except RuntimeError:  # the error has broken the device for this process
        return False


def _host_is_nearly_full() -> bool:
    """Return whether the system refuses this process a little more memory.

    Asking is the one test that knows all limits. Pages that nobody writes to cost nothing.
    """
    try:
        torch.empty(_NEARLY_FULL_BYTES, dtype=torch.uint8)
    except RuntimeError:
        return True
    return False
