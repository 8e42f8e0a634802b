from __future__ import annotations

import pytest
import torch
from torch import nn

from d2scale.step.optimizer_state import adapt_state, load_optimizer_state


def momentum_sgd(memory_format):
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3).to(memory_format=memory_format)
    parameter = nn.Parameter(weight)
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=True)
    return parameter, optimizer


def steps(parameter, optimizer, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (torch.contiguous_format, torch.channels_last),
        (torch.channels_last, torch.contiguous_format),
    ],
)
def test_a_state_of_another_memory_layout_goes_on_as_where_it_was_saved(saved, loaded):
    parameter, optimizer = momentum_sgd(saved)
    steps(parameter, optimizer, 2, seed=1)
    resumed, other = momentum_sgd(loaded)
    with torch.no_grad():
        resumed.copy_(parameter)
    load_optimizer_state(other, optimizer.state_dict())
    assert other.state[resumed]["momentum_buffer"].stride() == resumed.stride()
    steps(parameter, optimizer, 1, seed=2)
    steps(resumed, other, 1, seed=2)
    torch.testing.assert_close(resumed, parameter, rtol=0, atol=0)


def adamw(device, **options):
    parameter = nn.Parameter(torch.ones(2, device=device))
    return parameter, torch.optim.AdamW([parameter], lr=0.1, **options)


def test_adams_step_lies_where_its_kind_of_update_reads_it():
    # The device "meta" stands for a GPU here.
    parameter, fused = adamw("meta", fused=False)
    fused.param_groups[0]["fused"] = True
    fused.state[parameter] = {"step": torch.tensor(3.0)}
    adapt_state(fused)
    assert fused.state[parameter]["step"].device == parameter.device
    parameter, plain = adamw("cpu")
    plain.state[parameter] = {"step": torch.tensor(3.0)}
    adapt_state(plain)
    assert plain.state[parameter]["step"].device.type == "cpu"


def test_settings_stay_the_optimizers_own():
    parameter, saved = adamw("cpu", weight_decay=0.5)
    parameter.grad = torch.ones(2)
    saved.step()
    _, other = adamw("cpu", weight_decay=0.1)
    load_optimizer_state(other, saved.state_dict())
    assert other.param_groups[0]["weight_decay"] == 0.1


def test_other_parameters_are_refused():
    parameter, saved = adamw("cpu")
    parameter.grad = torch.ones(2)
    saved.step()
    other = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="no tensor of its shape"):
        load_optimizer_state(other, saved.state_dict())
    assert not other.state


@pytest.mark.parametrize(
    "value", [torch.tensor(1.5), torch.ones(2, device="meta"), torch.ones(2).to_sparse(), 1.5]
)
def test_an_average_that_is_none_is_refused(value):
    parameter, saved = adamw("cpu")
    parameter.grad = torch.ones(2)
    saved.step()
    state = saved.state_dict()
    state["state"][0]["exp_avg"] = value
    _, other = adamw("cpu")
    with pytest.raises(ValueError, match="exp_avg of parameter 0"):
        load_optimizer_state(other, state)
