"""What d2scale relies on in private parts of torch, tried on 2.4.1, 2.5.1, 2.9.1 and 2.15.0."""

from __future__ import annotations

import torch
from torch import nn

from d2scale.step import private_torch


def test_all_batch_norm_layers_have_one_base():
    for layer in (nn.BatchNorm1d(1), nn.BatchNorm2d(1), nn.BatchNorm3d(1), nn.SyncBatchNorm(1)):
        assert isinstance(layer, private_torch.BATCH_NORM)


def test_views_share_a_key_and_copies_do_not():
    tensor = torch.zeros(4)
    assert private_torch.storage_key(tensor[1:]) == private_torch.storage_key(tensor)
    assert private_torch.storage_key(tensor.clone()) != private_torch.storage_key(tensor)


def test_the_engine_accumulates_into_leaves():
    leaf = torch.ones(2, requires_grad=True)
    private_torch.run_backward((leaf * 3).sum())
    private_torch.run_backward((leaf * 3).sum())
    assert leaf.grad.tolist() == [6.0, 6.0]


def test_norms_of_many_tensors():
    assert private_torch.norms_of([]) == []
    norms = private_torch.norms_of([torch.full((4,), 2.0), torch.tensor([[3.0, 4.0]]).double()])
    assert [norm.item() for norm in norms] == [4.0, 5.0]
    assert [norm.dtype for norm in norms] == [torch.float32, torch.float64]


def test_modules_can_share_their_tensors():
    source, module = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    private_torch.share_tensors(module, source)
    assert module.weight is source.weight
    assert module.running_mean is source.running_mean


def test_fake_tensors_have_shapes_and_no_values():
    with private_torch.FakeTensorMode():
        tensor = torch.zeros(3) + 1
        assert tensor.shape == (3,)
        try:
            tensor.sum().item()
        except private_torch.NOT_FAKEABLE:
            return
    raise AssertionError("a fake tensor has given a value")


def test_many_tensors_of_several_types_are_copied():
    sources = [torch.rand(3), torch.arange(4), torch.rand(2, dtype=torch.float64)]
    targets = [torch.zeros_like(source) for source in sources] + [torch.zeros(3).half()]
    private_torch.copy_all(list(zip(targets, [*sources, sources[0]], strict=True)))
    assert all(torch.equal(*pair) for pair in zip(targets[:3], sources, strict=True))
    assert torch.equal(targets[3], sources[0].half())
    private_torch.copy_all([])


def test_a_scalers_values_are_its_own_tensors():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scale, steps = private_torch.scaler_values(scaler)
    assert (scale.item(), steps.item()) == (8.0, 0)
    scale.fill_(2.0)
    assert scaler.get_scale() == 2.0
    assert private_torch.scaler_values(torch.amp.GradScaler("cpu", enabled=False)) == []
