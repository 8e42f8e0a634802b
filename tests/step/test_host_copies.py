from __future__ import annotations

import pytest
import torch

from d2scale.step.host_copies import HostCopies

TENSORS = {
    "weights": torch.rand(4, 3, 3, 3),
    "channels last": torch.rand(4, 3, 3, 3).to(memory_format=torch.channels_last),
    "of another type": torch.arange(7),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0),
    "not dense": torch.rand(6, 8)[::2, 1:],
}


def test_values_come_back_in_place_whatever_the_layout():
    tensors = [tensor.clone(memory_format=torch.preserve_format) for tensor in TENSORS.values()]
    tensors[-1] = torch.rand(6, 8)[::2, 1:]
    before = [tensor.clone() for tensor in tensors]
    copies = HostCopies()
    copies.take(tensors)
    for tensor in tensors:
        tensor.zero_()
    copies.bring_back()
    for tensor, value in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)


def test_all_that_is_new_shares_one_block_and_stays_there():
    weights, momentum = torch.rand(5), torch.rand(5)
    copies = HostCopies()
    copies.take([weights])
    first = copies._copies[weights].data_ptr()
    copies.take([weights, momentum, TENSORS["weights"]])
    assert copies._copies[weights].data_ptr() == first
    blocks = {copy.untyped_storage().data_ptr() for copy in copies._copies.values()}
    assert len(blocks) == 2
    copies.take([momentum])
    assert list(copies._copies) == [momentum]


def test_a_gpus_tensors_are_copied_to_pinned_memory_without_waiting(monkeypatch):
    pinned, asynchronous = [], []
    empty, foreach_copy = torch.empty, torch._foreach_copy_

    def not_pinned(*size, pin_memory=False, **options):
        pinned.append(pin_memory)
        return empty(*size, **options)

    def observed(targets, sources, non_blocking=False):
        asynchronous.append(non_blocking)
        foreach_copy(targets, sources, non_blocking)

    monkeypatch.setattr(torch, "empty", not_pinned)
    monkeypatch.setattr(torch, "_foreach_copy_", observed)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    HostCopies().take([torch.rand(3), torch.rand(2)])
    assert pinned == asynchronous == [True]


@pytest.mark.parametrize("tensors", [[], [torch.zeros(0)]])
def test_nothing_to_copy(tensors):
    copies = HostCopies()
    copies.take(tensors)
    copies.bring_back()
