from __future__ import annotations

import torch
from torch import nn

from d2scale.engine.launch import launch
from d2scale.step import agreement
from d2scale.step.agreement import _buckets
from rank_functions import averaged_gradients


def test_gradient_that_a_rank_lacks_counts_as_zero():
    everywhere, on_one, nowhere = launch(averaged_gradients, num_processes=2)
    assert torch.equal(everywhere, torch.full((3,), 1.5))
    assert torch.equal(on_one, torch.full((2,), 0.5))
    assert nowhere is None


def test_buckets_hold_one_dtype_and_are_small(monkeypatch):
    monkeypatch.setattr(agreement, "_BUCKET_BYTES", 24)
    singles = [nn.Parameter(torch.zeros(size)) for size in (4, 2, 1, 100, 1)]
    double = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    found = _buckets([singles[0], double, *singles[1:]])
    sizes = [[parameter.numel() for parameter in bucket] for bucket in found]
    assert sizes == [[4, 2], [1], [100], [1], [1]]
    assert found[-1][0] is double
