from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from d2scale.launch.launch import launch
from d2scale.launch.topology import Topology
from d2scale.step.norms import (
    HostSyncBatchNorm,
    plain_norms,
    synchronise_norms,
    synchronised_norms,
    without_synchronised_norms,
)
from norm_functions import norms_of_two_ranks, synchronised_training


def test_synchronised_batch_norm_becomes_plain_on_one_rank(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4, momentum=0.3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert synchronised_norms(model) == ("1",)
    with caplog.at_level(logging.INFO):
        plain = without_synchronised_norms(model).train()
    assert "1 synchronised batch norm layers become plain" in caplog.text
    assert type(plain[1]) is nn.BatchNorm2d
    assert synchronised_norms(plain) == ()
    before = plain[1].bias.clone()
    plain(torch.rand(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    assert plain[1].running_mean.abs().sum() > 0
    assert not torch.equal(plain[1].bias, before)
    caplog.clear()
    without_synchronised_norms(plain)
    assert not caplog.records


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """Named as detectron2's."""


def test_detectron2s_synchronised_batch_norm_becomes_plain_too():
    model = nn.Sequential(NaiveSyncBatchNorm(4))
    plain = without_synchronised_norms(model, "memory is being measured")
    assert type(plain[0]) is nn.BatchNorm2d


@pytest.mark.timeout(120)
def test_two_ranks_normalise_as_one_rank_with_all_images():
    one = synchronised_training()
    two, apart, kinds = launch(norms_of_two_ranks, topology=Topology(2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (two[name] - value).abs().max() < 1e-13, name
    assert (apart["0.weight"] - one["0.weight"]).abs().max() > 1e-6
    # The second one is frozen.
    assert kinds == ["HostSyncBatchNorm", "BatchNorm2d", "HostSyncBatchNorm", "GroupNorm"]


def test_a_gpu_has_torchs_own_layer(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    weight, optimizer = model[1].weight, torch.optim.SGD(model.parameters(), lr=1.0)
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)
    assert plain_norms(synchronise_norms(model, True)) == ()
    assert type(model[1]) is nn.SyncBatchNorm
    assert model[1].weight is weight is optimizer.param_groups[0]["params"][2]


def test_the_hosts_layer_evaluates_and_averages_as_torchs():
    for momentum in (0.3, None):
        norms = [nn.BatchNorm2d(4, momentum=momentum).double() for _ in range(2)]
        norms[1] = HostSyncBatchNorm.of(norms[1])
        for _ in range(2):
            images = torch.rand(3, 4, 5, 5, dtype=torch.float64)
            found, expected = norms[1](images), norms[0](images)
            torch.testing.assert_close(found, expected)
        for norm in norms:
            norm.eval()
        torch.testing.assert_close(norms[1](images), norms[0](images))
