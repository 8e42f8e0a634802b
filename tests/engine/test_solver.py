from __future__ import annotations

import math
from bisect import bisect_right

import pytest
import torch
from torch import nn

from d2scale.config import get_cfg
from d2scale.engine.solver import (
    build_gradient_clipper,
    build_lr_schedule,
    build_optimizer,
    parameter_groups,
)


def config(**solver):
    cfg = get_cfg()
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def learning_rates(cfg, iterations):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    schedule = build_lr_schedule(cfg, optimizer)
    found = []
    for iteration in iterations:
        shown = schedule.set(iteration)
        assert optimizer.param_groups[0]["lr"] == shown
        found.append(shown)
    return found


def warmup(iteration, cfg):
    """The linear or constant warm-up's factor, as detectron2 documents it."""
    alpha = iteration / cfg.SOLVER.WARMUP_ITERS
    factor = cfg.SOLVER.WARMUP_FACTOR
    return factor if cfg.SOLVER.WARMUP_METHOD == "constant" else factor * (1 - alpha) + alpha


@pytest.mark.parametrize("method", ["linear", "constant"])
@pytest.mark.parametrize("warmup_iters", [0, 7, 100])
def test_multi_step_schedule_at_every_iteration(method, warmup_iters):
    cfg = config(
        BASE_LR=0.01,
        MAX_ITER=300,
        STEPS=(200, 250),
        WARMUP_ITERS=warmup_iters,
        WARMUP_METHOD=method,
    )
    expected = [
        0.01 * warmup(i, cfg) if i < warmup_iters else 0.01 * 0.1 ** bisect_right((200, 250), i)
        for i in range(300)
    ]
    assert learning_rates(cfg, range(300)) == pytest.approx(expected, rel=1e-12)


def test_warmup_ends_in_the_step_that_it_hides():
    # As in detectron2: the warm-up rises to the schedule's value at its end.
    cfg = config(BASE_LR=1.0, MAX_ITER=100, STEPS=(20,), WARMUP_ITERS=40, WARMUP_FACTOR=0.0)
    found = learning_rates(cfg, range(100))
    assert found[20] == pytest.approx(0.05)
    assert found[40:] == [0.1] * 60


@pytest.mark.parametrize("rescale", [False, True])
def test_cosine_schedule_at_every_iteration(rescale):
    cfg = config(
        LR_SCHEDULER_NAME="WarmupCosineLR",
        BASE_LR=0.02,
        BASE_LR_END=0.002,
        MAX_ITER=200,
        WARMUP_ITERS=50,
        RESCALE_INTERVAL=rescale,
    )

    def cosine(progress):
        return 0.002 + 0.5 * (0.02 - 0.002) * (1 + math.cos(math.pi * progress))

    top = 0.02 if rescale else cosine(0.25)
    expected = [
        0.02 * 0.001 * (1 - i / 50) + top * (i / 50)
        if i < 50
        else cosine((i - 50) / 150 if rescale else i / 200)
        for i in range(200)
    ]
    assert learning_rates(cfg, range(200)) == pytest.approx(expected, rel=1e-12)


def test_published_baseline():
    cfg = config(BASE_LR=0.01, MAX_ITER=30000, STEPS=(20000, 25000))
    moments = (0, 500, 999, 1000, 19999, 20000, 24999, 25000, 29999)
    expected = [1e-5, 0.005005, 0.00999001, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    assert learning_rates(cfg, moments) == pytest.approx(expected, rel=1e-12)


def test_warmup_longer_than_the_training():
    cfg = config(BASE_LR=1.0, MAX_ITER=10, STEPS=(), WARMUP_ITERS=1000)
    assert learning_rates(cfg, [0, 9]) == pytest.approx([0.001, 0.9001])


def test_schedule_keeps_the_ratio_of_groups():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.01, 0.02)]
    groups[1]["params"].append(nn.Parameter(torch.zeros(1)))
    optimizer = torch.optim.SGD(groups)
    shown = build_lr_schedule(config(BASE_LR=0.01, WARMUP_ITERS=0), optimizer).set(30000)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.001, 0.002])
    assert shown == pytest.approx(0.002)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.again = self.conv
        self.tied = nn.Linear(1, 1, bias=False)
        self.tied.weight = self.norm.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def named_groups(model, groups):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        ({names[p] for p in group["params"]}, group["lr"], group["weight_decay"])
        for group in groups
    ]


def test_groups_with_every_override():
    model = Small()
    groups = parameter_groups(
        model,
        base_lr=0.1,
        weight_decay=0.01,
        weight_decay_norm=0.0,
        weight_decay_bias=0.02,
        bias_lr_factor=2.0,
    )
    assert named_groups(model, groups) == [
        ({"conv.weight"}, 0.1, 0.01),
        ({"conv.bias", "norm.bias"}, 0.2, 0.02),
        ({"norm.weight"}, 0.1, 0.0),
    ]


def test_groups_of_the_defaults():
    model = Small()
    groups = named_groups(model, build_optimizer(config(), model).param_groups)
    assert groups == [
        ({"conv.weight", "conv.bias"}, 0.001, 0.0001),
        ({"norm.weight", "norm.bias"}, 0.001, 0.0),
    ]


def test_groups_without_norm_override_are_one():
    assert len(parameter_groups(Small(), base_lr=0.1, weight_decay=0.01)) == 1


def test_optimizers_take_their_settings():
    sgd = build_optimizer(config(MOMENTUM=0.8, NESTEROV=True), Small())
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.8, True)
    adamw = build_optimizer(config(OPTIMIZER="AdamW", BETAS=(0.8, 0.9), EPS=1e-7), Small())
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["betas"], adamw.defaults["eps"]) == ((0.8, 0.9), 1e-7)
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.0001, 0.0}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("value", [[0.5, 0.5], [0.1]]),
        ("norm", [[0.3, 0.4], [0.1]]),
    ],
)
def test_clipping_of_each_parameter(kind, expected):
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.tensor([3.0, 4.0])
    parameters[1].grad = torch.tensor([0.1])
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.merge_from_list(
        ["ENABLED", True, "CLIP_TYPE", kind, "CLIP_VALUE", 0.5]
    )
    build_gradient_clipper(cfg)(parameters)
    found = [parameter.grad.tolist() for parameter in parameters]
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)


def test_full_model_clipping_is_over_all_parameters():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for parameter, value in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([value])
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.merge_from_list(["ENABLED", True, "CLIP_TYPE", "full_model"])
    build_gradient_clipper(cfg)(parameters)
    assert [p.grad.item() for p in parameters] == pytest.approx([0.6, 0.8], rel=1e-5)


def test_no_clipping_by_default():
    assert build_gradient_clipper(get_cfg()) is None
