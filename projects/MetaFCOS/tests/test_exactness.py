"""A step in micro-batches over ranks has the gradient of the one big batch."""

from __future__ import annotations

import pytest
import torch

SIZE = (96, 128)


def gradient(model):
    gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return torch.cat(gradients)


def averaged_gradient(model, ranks):
    """What DistributedDataParallel leaves after these micro-batches on each rank."""
    micro_batches = [batch for rank in ranks for batch in rank]
    sums = [model.loss_normalizers(batch) for batch in micro_batches]
    totals = {name: sum(s[name] for s in sums) for name in sums[0]}
    normalizers = model.finish_normalizers(totals, len(ranks))
    for batch in micro_batches:
        (sum(model(batch, normalizers).values()) / len(ranks)).backward()
    return gradient(model)


@pytest.mark.parametrize(
    "split",
    [
        [[6]],
        [[3, 3]],
        [[4, 2]],
        [[3], [3]],
        [[2, 1], [2, 1]],
        [[3], [2], [1]],
        [[1, 1], [2, 1], [1]],
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
def test_the_split_does_not_change_the_gradient(make_detector, make_sample, split, norm):
    model = make_detector(norm=norm, freeze_at=2).double()
    # Images of several sizes, one of them without boxes, padded to one size.
    sizes = ((96, 128), (70, 128), (96, 100), (80, 80), (64, 128), (96, 96))
    samples = [
        make_sample(*size, count=seed % 4, seed=seed, pad_to=SIZE)
        for seed, size in enumerate(sizes)
    ]
    sum(model(samples).values()).backward()
    expected = gradient(model)
    assert expected.norm() > 0.1

    images = iter(samples)
    ranks = [[[next(images) for _ in range(count)] for count in rank] for rank in split]
    found = averaged_gradient(model, ranks)

    assert (found - expected).norm() <= 1e-10 * expected.norm()


def test_steps_with_fewer_positives_than_ranks_are_exact_too(make_detector, make_sample):
    model = make_detector().double()
    samples = [make_sample(count=0, seed=seed, pad_to=SIZE) for seed in range(3)]
    sum(model(samples).values()).backward()
    expected = gradient(model)
    found = averaged_gradient(model, [[[sample]] for sample in samples])
    assert (found - expected).norm() <= 1e-10 * expected.norm()


def test_own_normalizers_are_the_sums_of_the_batch(make_detector, make_sample):
    model = make_detector().double()
    samples = [make_sample(seed=1), make_sample(seed=2)]
    sums = model.loss_normalizers(samples)
    assert {value.dtype for value in sums.values()} == {torch.float64}
    assert sums["num_positives"] > 5
    losses = model(samples, model.finish_normalizers(sums, 1))
    torch.testing.assert_close(losses, model(samples), rtol=1e-12, atol=0)
    parts = [model.loss_normalizers([sample]) for sample in samples]
    added = {name: parts[0][name] + parts[1][name] for name in sums}
    torch.testing.assert_close(added, sums, rtol=1e-12, atol=0)
