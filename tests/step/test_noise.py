from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from d2scale.launch.launch import launch
from d2scale.launch.topology import Topology
from d2scale.planning.gain import gain_of
from d2scale.step.noise import GradientNoise, NoiseAverage, SquaredNorms
from d2scale.step.optimizer_step import OptimizerStep, StepOptions
from rank_functions import forward_backward, measured_noise, split
from standins import PlainStandIn, StandIn, make_samples

PARTS = [(8, 8), (5, 2, 1), (1, 1, 1, 1, 12), (3, 3)]


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_estimates_are_right_in_the_mean(parts):
    """Images' gradients of a known mean and covariance, in even and uneven parts."""
    rng = np.random.default_rng(0)
    draws, images = 100_000, sum(parts)
    deviations = np.array([2.0, 1.0, 0.5, 0.5])
    mean = np.array([0.6, -0.3, 0.2, 0.1])
    variance, signal = (deviations**2).sum(), (mean**2).sum()
    gradients = mean + deviations * rng.standard_normal((draws, images, 4))
    contributions = [
        part.sum(axis=1) / images for part in np.split(gradients, np.cumsum(parts)[:-1], axis=1)
    ]
    weighted = sum(
        (c**2).sum(axis=1) * images / size for c, size in zip(contributions, parts, strict=True)
    )
    total = (sum(contributions) ** 2).sum(axis=1)
    # The formula is linear: the estimate of the means is the mean of the estimates.
    noise = GradientNoise.of_parts(weighted.mean(), total.mean(), parts=len(parts), images=images)
    assert noise.variance == pytest.approx(variance, rel=0.01)
    assert noise.signal == pytest.approx(signal, rel=0.01)


def expected_noise(model_class, micro_batches):
    """Noise from gradients that are kept whole, one backward pass for each part."""
    images = sum(map(len, micro_batches))
    gradients = []
    for micro_batch in micro_batches:
        model = model_class(torch.float64)
        if isinstance(model, StandIn):
            samples = [sample for each in micro_batches for sample in each]
            totals = model.finish_normalizers(model.loss_normalizers(samples), 1)
            sum(model(micro_batch, totals).values()).backward()
        else:
            (model(micro_batch)["loss"] * len(micro_batch) / images).backward()
        flat = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(flat))
    weighted = sum(
        float(c.square().sum()) * images / len(part)
        for c, part in zip(gradients, micro_batches, strict=True)
    )
    total = float(sum(gradients).square().sum())
    return GradientNoise.of_parts(weighted, total, parts=len(micro_batches), images=images)


@pytest.mark.parametrize("model_class", [StandIn, PlainStandIn])
@pytest.mark.parametrize("sizes", [[4, 4], [3, 2, 1], [1] * 5], ids=str)
def test_a_step_measures_what_whole_gradients_give(model_class, sizes):
    (micro_batches,) = split(make_samples(sum(sizes)), [sizes])
    noise = forward_backward(model_class(torch.float64))(micro_batches, measure=True).noise
    expected = expected_noise(model_class, micro_batches)
    assert noise.variance == pytest.approx(expected.variance, rel=1e-10)
    assert noise.signal == pytest.approx(expected.signal, rel=1e-10)


@pytest.mark.parametrize(
    "layouts",
    [[[[4, 4]], [[4], [4]]], [[[2, 2, 2, 2]], [[2, 2], [2, 2]], [[2], [2], [2], [2]]]],
    ids=["two parts", "four parts"],
)
def test_the_same_parts_on_other_ranks_have_the_same_gain(layouts):
    gains = []
    for rank_sizes in layouts:
        args = [[StandIn, PlainStandIn], rank_sizes]
        noises = launch(measured_noise, args, Topology(len(rank_sizes)))
        gains.append([gain_of(noise.scale, 8, 2) for noise in noises])
    for gain in gains[1:]:
        assert gain == pytest.approx(gains[0], rel=1e-10)


def test_measuring_changes_no_bit_of_the_gradient():
    (micro_batches,) = split(make_samples(8), [[3, 3, 2]])
    models = [StandIn(), StandIn()]
    for model, measure in zip(models, (False, True), strict=True):
        forward_backward(model)(micro_batches, measure=measure)
    for plain, measured in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(plain.grad, measured.grad)


def take_step(ims_per_gpu, images=4, measure=True, dtype=torch.float64, **options):
    model = StandIn(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = OptimizerStep(model, optimizer, ims_per_gpu=ims_per_gpu, options=StepOptions(**options))
    return step(make_samples(images), measure=measure)


def test_a_step_in_one_part_is_cut_in_two_to_measure():
    whole, cut = take_step(4), take_step(2)
    assert whole.noise == cut.noise
    assert whole.noise is not None
    assert take_step(4, measure=False).noise is None


def test_one_image_measures_nothing():
    assert take_step(1, images=1).noise is None


def test_scaled_and_clipped_gradients_measure_the_same():
    def clip(parameters):
        nn.utils.clip_grad_norm_(parameters, 1e-6)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    noise, expected = take_step(2, scaler=scaler, clip=clip).noise, take_step(2).noise
    assert noise.variance == pytest.approx(expected.variance)
    assert noise.signal == pytest.approx(expected.signal)


def test_overflow_and_no_gradient_measure_nothing():
    assert GradientNoise.of_parts(math.inf, 1.0, parts=2, images=4) is None
    assert GradientNoise.of_parts(1.0, math.nan, parts=2, images=4) is None
    assert GradientNoise.of_parts(0.0, 0.0, parts=2, images=4) is None
    assert GradientNoise.of_parts(1.0, 1.0, parts=1, images=4) is None
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    assert take_step(2, dtype=torch.float32, scaler=scaler).noise is None


def test_a_parameter_used_twice_counts_by_the_sum_of_its_gradient():
    weight = nn.Parameter(torch.tensor([2.0]))
    with SquaredNorms([weight]).of_backward() as norms:
        (weight * 3 + weight * 4).sum().backward()
    assert SquaredNorms([weight]).total(norms).item() == 49.0


def test_a_gradient_completed_in_pieces_measures_nothing():
    """As reentrant activation checkpointing does where a layer is used on several levels."""
    layer = nn.Linear(2, 2)
    inputs = torch.ones(1, 2, requires_grad=True)
    norms = SquaredNorms(list(layer.parameters()))
    for _ in range(2):
        with norms.of_backward() as found:
            output = sum(
                torch.utils.checkpoint.checkpoint(layer, inputs * level, use_reentrant=True)
                for level in (1.0, 2.0)
            )
            output.sum().backward()
    assert math.isnan(norms.total(found))


def test_a_parameter_frozen_while_training_counts_as_zero():
    (micro_batches,) = split(make_samples(4), [[2, 2]])
    model = StandIn()
    step = forward_backward(model)
    step(micro_batches, measure=True)
    model.zero_grad()
    model.stem.requires_grad_(False)
    assert step(micro_batches, measure=True).noise is not None


def test_half_precision_does_not_overflow():
    weight = nn.Parameter(torch.full((100,), 1.0, dtype=torch.float16))
    weight.grad = torch.full((100,), 3e4, dtype=torch.float16)
    assert SquaredNorms([weight]).of_gradients().item() == pytest.approx(100 * 3e4**2, rel=1e-3)


def test_the_average_is_of_variance_and_signal_and_forgets():
    average = NoiseAverage()
    assert average.value is None
    average = average.updated(GradientNoise(4.0, -1.0))
    assert average.value == GradientNoise(pytest.approx(4.0), pytest.approx(-1.0))
    assert average.value.scale == math.inf
    for _ in range(200):
        average = average.updated(GradientNoise(6.0, 2.0)).updated(None)
    assert average.value == GradientNoise(pytest.approx(6.0), pytest.approx(2.0))
    assert NoiseAverage.from_state_dict(average.state_dict()) == average


def test_the_gain_is_that_of_fairscales_adascale():
    """fairscale limits every step's estimates, we their average; here no limit is reached."""
    adascale = pytest.importorskip("fairscale.optim.adascale", reason="needs fairscale")
    parts, size, decay = 4, 50, 0.7
    torch.manual_seed(0)
    model = nn.Linear(20, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    theirs = adascale.AdaScale(optimizer, num_gradients_to_accumulate=parts, smoothing=decay)
    average = NoiseAverage(decay=decay)
    norms = SquaredNorms(list(model.parameters()))
    for _ in range(30):
        weighted = 0.0
        for _ in range(parts):
            inputs = torch.randn(size, 20, dtype=torch.float64)
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean() / parts
            with norms.of_backward() as found:
                loss.backward()
            weighted += norms.total(found).item() * parts
        images = parts * size
        total = norms.of_gradients().item()
        noise = GradientNoise.of_parts(weighted, total, parts=parts, images=images)
        assert noise.signal > 0
        average = average.updated(noise)
        theirs.step()
        optimizer.zero_grad()
        assert theirs.gain() == pytest.approx(gain_of(average.value.scale, images, size), rel=1e-6)
