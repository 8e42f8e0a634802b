from __future__ import annotations

import pytest
import torch
from torch import nn

from d2scale.step.update import MomentumByGain, update_weights


@pytest.fixture
def uninitialised_memory_is_nan(monkeypatch):
    """Let torch.empty show itself, as a busy device would."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def train(gradients, **options):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, fused=True, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler.scale(torch.zeros(()))
    for gradient in gradients:
        parameter.grad = torch.full((3,), gradient) * scaler.get_scale()
        update_weights(optimizer, scaler)
    return parameter.detach(), optimizer.state[parameter]["momentum_buffer"]


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_begins_at_zero_when_the_first_step_overflows(
    uninitialised_memory_is_nan, nesterov
):
    weights, momentum = train([float("inf"), 1.0, 1.0], momentum=0.9, nesterov=nesterov)
    expected = train([1.0, 1.0], momentum=0.9, nesterov=nesterov)
    torch.testing.assert_close(weights, expected[0])
    torch.testing.assert_close(momentum, expected[1])


def test_a_first_step_from_zero_momentum_is_torchs_own():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=True)
    for _ in range(2):
        parameter.grad = torch.ones(3)
        optimizer.step()
    weights, momentum = train([1.0, 1.0], momentum=0.9)
    torch.testing.assert_close(weights, parameter.detach())
    torch.testing.assert_close(momentum, optimizer.state[parameter]["momentum_buffer"])


def test_clipping_sees_unscaled_gradients_of_trained_parameters():
    trained, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = torch.optim.SGD([trained, unused, frozen], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    trained.grad = torch.full((2,), 8.0)
    seen = []
    update_weights(optimizer, scaler, lambda parameters: seen.extend(p.grad for p in parameters))
    assert [gradient.tolist() for gradient in seen] == [[1.0, 1.0]]
    assert trained.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_worth_three_is_three_steps_of_the_same_gradient(fused):
    """As far as momentum goes; the weights follow with the learning rate."""
    momenta = []
    for gains in ([1.0] * 6, [3.0, 3.0], [1.5] * 4, [0.5] * 12):
        parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=fused)
        by_gain = MomentumByGain(optimizer)
        for gain in gains:
            parameter.grad = torch.full((3,), 2.0, dtype=torch.float64)
            by_gain.set(gain)
            update_weights(optimizer)
        momenta.append(optimizer.state[parameter]["momentum_buffer"])
    for momentum in momenta[1:]:
        torch.testing.assert_close(momentum, momenta[0])


def test_a_gain_of_one_leaves_the_optimizer_as_it_is():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    by_gain = MomentumByGain(optimizer)
    by_gain.set(2.5)
    by_gain.set(1.0)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["dampening"]) == (0.9, 0.0)
    MomentumByGain(torch.optim.AdamW([nn.Parameter(torch.ones(1))])).set(2.0)
    nesterov = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1, momentum=0.9, nesterov=True)
    MomentumByGain(nesterov).set(2.0)
    assert (nesterov.param_groups[0]["momentum"], nesterov.param_groups[0]["dampening"]) == (0.9, 0)
