from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from d2scale.launch.launch import Topology, launch
from d2scale.planning.rules import micro_batch_sizes
from d2scale.step.averaging import GradientAverager
from d2scale.step.forward_backward import ForwardBackward
from d2scale.step.micro_batches import cut, inexact_reasons
from rank_functions import (
    forward_backward,
    gradients_in_ranks,
    split,
    step_gradients,
    unused_parameters,
)
from standins import PlainStandIn, StandIn, make_samples


def assert_same(found, expected, relative=1e-10):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < relative, (name, error)


def whole_step(model_class, total):
    return step_gradients(model_class(torch.float64), [make_samples(total)])


@pytest.mark.parametrize("ims_per_gpu", [1, 3, 4, 16])
@pytest.mark.parametrize("model_class", [StandIn, PlainStandIn])
def test_micro_batches_give_the_step_of_the_big_batch(model_class, ims_per_gpu):
    sizes = micro_batch_sizes(16, 1, ims_per_gpu)
    expected_losses, expected = whole_step(model_class, 16)
    losses, found = step_gradients(model_class(torch.float64), split(make_samples(16), sizes)[0])
    assert_same(found, expected)
    assert losses.losses == pytest.approx(expected_losses.losses, rel=1e-12)
    assert losses.images == 16


def test_mean_of_means_would_not():
    # The reason for the protocol: with counts of each micro-batch the gradient is another one.
    expected = whole_step(StandIn, 16)[1]
    model = StandIn(torch.float64)
    for micro_batch in split(make_samples(16), [(4, 4, 4, 4)])[0]:
        (sum(model(micro_batch).values()) / 4).backward()
    error = (model.score.weight.grad - expected["score.weight"]).norm()
    assert error > 1e-3 * expected["score.weight"].norm()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_the_step_of_the_big_batch(world_size):
    # On 3 ranks 16 images are 6, 5 and 5: with 5 a GPU that is 2, 1 and 1 micro-batches.
    cases = [
        (model_class, total, ims_per_gpu)
        for model_class in (StandIn, PlainStandIn)
        for total, ims_per_gpu in ((16, 16), (16, 5), (16, 2), (5, 1))
    ]
    results = launch(gradients_in_ranks, [cases], Topology(world_size))
    for (model_class, total, _), (losses, found) in zip(cases, results, strict=True):
        expected_losses, expected = whole_step(model_class, total)
        assert_same(found, expected)
        assert losses.losses == pytest.approx(expected_losses.losses, rel=1e-12)
        assert losses.images == total


def test_parameter_that_only_an_early_micro_batch_uses():
    assert launch(unused_parameters, topology=Topology(2))


def test_bfloat16_autocast_reaches_the_model():
    seen = []

    class Watched(StandIn):
        def features(self, sample):
            seen.append(
                torch.is_autocast_enabled("cpu") and self.stem(torch.zeros(1, 3, 4, 4)).dtype
            )
            return super().features(sample)

    forward_backward(Watched(), precision=torch.bfloat16)([make_samples(2)])
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_scaler_scales_the_gradients():
    micro_batches = [make_samples(4)[:1], make_samples(4)[1:]]
    _, expected = step_gradients(StandIn(torch.float64), micro_batches)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses, found = step_gradients(StandIn(torch.float64), micro_batches, scaler=scaler)
    assert_same(found, {name: value * 1024 for name, value in expected.items()})
    assert losses.total < 1000


@pytest.mark.parametrize("micro_batches", [[], [[]], [make_samples(1), []]])
def test_empty_micro_batches_are_refused(micro_batches):
    with pytest.raises(ValueError, match="at least one micro-batch"):
        forward_backward(StandIn())(micro_batches)


def test_reasons_are_told_once(caplog):
    model = nn.Sequential()
    model.inner = PlainStandIn()
    model.forward = model.inner.forward
    model.add_module("batch_norm", nn.BatchNorm2d(3))
    step = forward_backward(model)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            step([make_samples(1), make_samples(1)])
    assert len(caplog.records) == 1
    assert "loss normalizers" in caplog.text
    assert "boxes sampled at random and padding" in caplog.text
    assert "batch_norm" in caplog.text


def test_no_reasons_for_one_micro_batch_or_an_exact_model(caplog):
    forward_backward(PlainStandIn())([make_samples(2)])
    forward_backward(StandIn())([make_samples(2), make_samples(1)])
    assert not caplog.records


def test_frozen_batch_norm_is_exact():
    model = StandIn()
    model.add_module("batch_norm", nn.BatchNorm2d(3).eval())
    assert inexact_reasons(model, model) == ()


def test_a_rank_batch_is_cut_in_order():
    assert cut([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert cut([1, 2, 3, 4], 3) == [[1, 2], [3, 4]]


def test_losses_of_shape_one_are_summed():
    # detectron2 sums such losses.
    class Summing(PlainStandIn):
        def forward(self, samples):
            return {"loss": super().forward(samples)["loss"].reshape(1)}

    losses, _ = step_gradients(Summing(), [make_samples(2), make_samples(2)])
    expected, _ = step_gradients(PlainStandIn(), [make_samples(2), make_samples(2)])
    assert losses.losses == expected.losses


def test_copies_to_the_host_begin_after_what_may_read_values():
    """A value that loss normalizers read would wait for all copies that were begun before."""
    order = []

    class Reading(StandIn):
        def loss_normalizers(self, samples):
            order.append("normalizers")
            return super().loss_normalizers(samples)

        def forward(self, samples, normalizers=None):
            order.append("forward")
            return super().forward(samples, normalizers)

    model = Reading()
    averager = GradientAverager(list(model.parameters()))
    parts = [(None, make_samples(2)), (None, make_samples(1))]
    ForwardBackward(model, averager)(parts, prepare=lambda: order.append("copies"))
    assert order == ["normalizers", "normalizers", "copies", "forward", "forward"]
