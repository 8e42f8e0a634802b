import subprocess
import sys

import pytest
import torch

from d2scale.step.out_of_memory import OutOfMemoryError, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        torch.cuda.OutOfMemoryError("whatever it says"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"),
        RuntimeError("miopenStatusAllocFailed"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        MemoryError(),
    ],
)
def test_what_runs_out_of_memory(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_what_does_not(error):
    assert not is_out_of_memory(error)


def test_the_machines_own_error_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(("free_mib", "is_memory"), [(100, True), (1000, False)])
def test_a_library_that_fails_to_start_counts_on_a_full_device(monkeypatch, free_mib, is_memory):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_mib * 2**20, 2**34))
    for library in ("CUBLAS", "CUDNN"):
        for failure in ("NOT_INITIALIZED", "EXECUTION_FAILED", "INTERNAL_ERROR"):
            error = RuntimeError(f"CUDA error: {library}_STATUS_{failure}")
            assert is_out_of_memory(error) == is_memory


def test_a_device_that_an_error_has_broken_is_not_full(monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))


def test_onednn_counts_where_the_system_refuses_memory(monkeypatch):
    error = RuntimeError("could not create a primitive")
    assert not is_out_of_memory(error)

    def refuse(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", refuse)
    assert is_out_of_memory(error)


CONVOLUTIONS = """
import resource, torch
from d2scale.step.out_of_memory import is_out_of_memory
torch.set_num_threads(1)
net = torch.nn.Sequential(*[torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 50 * 2**20,) * 2)
for images in range(1, 30):
    try:
        net(torch.randn(images, 16, 100 + 3 * images, 200)).sum().backward()
    except Exception as error:
        print(is_out_of_memory(error), str(error)[:40])
"""


def test_whatever_a_full_machine_says_in_a_convolution_is_recognised():
    command = [sys.executable, "-c", CONVOLUTIONS]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines
    assert all(line.startswith("True") for line in lines), lines
