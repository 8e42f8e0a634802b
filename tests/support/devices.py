"""Test bodies that run on a CPU and, marked gpu, on a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from d2scale.memory.devices import CudaDevice, Device, SimulatedDevice

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
on_both_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])

# Enough for every test that does not run out of memory on purpose.
_SIMULATED_BYTES = 4 * 2**30


def memory_of(device: str) -> Device:
    """The memory of a device; of a CPU, a simulated limit on its tensors."""
    if device == "cpu":
        return SimulatedDevice(_SIMULATED_BYTES)
    return CudaDevice(torch.device(device, 0))


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Let CUDA compute in TF32, or not."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
