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
    for status in ("CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_INTERNAL_ERROR"):
        assert is_out_of_memory(RuntimeError(f"CUDA error: {status}")) == is_memory
