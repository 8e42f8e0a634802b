"""A CUDA device, as far as what torch tells of it can be stood in for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from d2scale.memory.devices import CudaDevice, hold_to_budget
from d2scale.planning.gpu_assumptions import context_bytes
from d2scale.planning.memory_profile import GIB

MIB = 2**20
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Let torch tell of a GPU: its memory, what is taken beside this process's tensors."""
    limits = []

    def tell(total_gib, taken_bytes, *, reserved_bytes=0, generation=8):
        total = round(total_gib * GIB)
        free = total - taken_bytes - reserved_bytes
        properties = SimpleNamespace(total_memory=total, major=generation)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved_bytes)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(
            torch.cuda,
            "set_per_process_memory_fraction",
            lambda fraction, device: limits.append(fraction * total),
        )
        return limits

    return tell


@pytest.mark.parametrize(("total_gib", "reserve_bytes"), [(8, 256 * MIB), (80, 0.02 * 80 * GIB)])
def test_beside_a_measured_size_room_is_kept_for_what_torch_does_not_count(
    gpu, total_gib, reserve_bytes
):
    gpu(total_gib, 500 * MIB, reserved_bytes=3 * GIB)
    room = CudaDevice(GPU).room(total_gib * GIB)
    assert room == pytest.approx(total_gib * GIB - 500 * MIB - reserve_bytes)


def test_a_budget_is_this_processs_own_as_long_as_the_device_has_it(gpu):
    budget = 16 * GIB
    gpu(80, 20 * GIB)  # another process is on the card
    assert CudaDevice(GPU).room(budget) == budget - context_bytes(8)
    gpu(80, 72 * GIB)
    assert CudaDevice(GPU).room(budget) == pytest.approx(8 * GIB - 0.02 * 80 * GIB)


def test_the_budget_binds_the_training_as_it_did_the_trials(gpu):
    limits = gpu(80, 500 * MIB, generation=9)
    hold_to_budget(GPU, 16.0)
    assert limits == [pytest.approx(CudaDevice(GPU).room(16 * GIB))]
    hold_to_budget(GPU, 0.0)  # the whole device
    hold_to_budget(torch.device("cpu"), 16.0)
    assert len(limits) == 1


def test_newer_gpus_have_a_larger_context():
    assert context_bytes(0) == context_bytes(7) == context_bytes(8) < context_bytes(9)
    assert context_bytes(9) == context_bytes(12)
