from __future__ import annotations

import torch
from torch import nn

from d2scale.launch.launch import Topology, launch
from d2scale.step import averaging
from rank_functions import averaged_gradients


def test_gradient_that_a_rank_lacks_counts_as_zero():
    everywhere, on_one, nowhere = launch(averaged_gradients, topology=Topology(2))
    assert torch.equal(everywhere, torch.full((3,), 1.5))
    assert torch.equal(on_one, torch.full((2,), 0.5))
    assert nowhere is None


def test_buckets_are_small_and_begin_at_the_end(monkeypatch):
    monkeypatch.setattr(averaging, "BUCKET_BYTES", 24)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (4, 2, 1, 100, 1)]
    buckets = averaging.in_buckets(parameters)
    sizes = [[parameter.numel() for parameter in bucket] for bucket in buckets]
    assert sizes == [[1], [100], [1, 2], [4]]


def test_buckets_hold_one_dtype(monkeypatch):
    single, double = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    kinds = averaging.by_kind([single, double, single], None)
    assert [(dtype, len(members)) for (_, dtype), members in kinds.items()] == [
        (torch.float32, 2),
        (torch.float64, 1),
    ]
    ((_, compressed),) = averaging.by_kind([single, double], torch.float16)
    assert compressed == torch.float16


def test_gradients_keep_the_memory_layout_of_their_parameters():
    plain = nn.Parameter(torch.zeros(2, 3, 2, 2))
    last = nn.Parameter(torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last))
    for parameter in (plain, last):
        parameter.grad = torch.zeros_like(parameter)
    flat = torch.arange(48.0)
    views = [view for _, view in averaging._Bucket([plain, last]).views(flat)]
    assert [view.stride() for view in views] == [plain.stride(), last.stride()]
    assert sorted(torch.cat([view.reshape(-1) for view in views]).tolist()) == flat.tolist()
