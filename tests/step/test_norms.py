from __future__ import annotations

import logging

import torch
from torch import nn

from d2scale.step.norms import synchronised_norms, without_synchronised_norms


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
