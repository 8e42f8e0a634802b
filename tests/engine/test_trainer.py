from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from d2scale.config import get_cfg
from d2scale.engine.solver import build_lr_schedule, build_optimizer
from d2scale.engine.trainer import Trainer, seed_step
from d2scale.errors import D2ScaleError
from d2scale.step.optimizer_step import OptimizerStep, StepOptions
from rank_functions import forward_backward
from standins import StandIn, make_samples


def config():
    cfg = get_cfg()
    cfg.SOLVER.merge_from_list(["BASE_LR", 0.05, "MAX_ITER", 8, "STEPS", (6,), "WARMUP_ITERS", 3])
    return cfg


def steps_of(count, size=4):
    """Endless shares of a step, the same for every run, from step ``count`` on."""
    return (make_samples(size, seed=step) for step in itertools.count(count))


def make_trainer(model, ims_per_gpu=4, data=None, scaler=None, clip=None):
    cfg = config()
    optimizer = build_optimizer(cfg, model)
    options = StepOptions(scaler=scaler, clip=clip)
    return Trainer(
        OptimizerStep(model, optimizer, ims_per_gpu=ims_per_gpu, options=options),
        steps_of(0) if data is None else data,
        build_lr_schedule(cfg, optimizer),
        seed=0,
    )


class Dropping(StandIn):
    """Draws by chance in every forward."""

    def features(self, sample):
        return nn.functional.dropout(super().features(sample), training=self.training)


def test_steps_are_told_in_order():
    told = []
    make_trainer(StandIn()).train(3, [told.append])
    assert [step.iteration for step in told] == [0, 1, 2]
    assert [step.images_seen for step in told] == [4, 8, 12]
    assert [step.lr for step in told] == pytest.approx(
        [0.05 * (0.001 * (1 - i / 3) + i / 3) for i in range(3)]
    )
    assert all(step.seconds >= step.data_seconds >= 0 for step in told)


def test_loss_falls():
    told = []
    fixed = itertools.repeat(make_samples(4))
    make_trainer(StandIn(), data=fixed).train(8, [told.append])
    assert sum(told[-1].losses.values()) < 0.7 * sum(told[0].losses.values())


def test_micro_batches_train_the_same_weights():
    whole, split = StandIn(torch.float64), StandIn(torch.float64)
    make_trainer(whole).train(8, [])
    make_trainer(split, ims_per_gpu=2).train(8, [])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], value, rtol=1e-10, atol=1e-12)


def test_chance_inside_the_model_depends_on_the_step_alone():
    undisturbed, resumed = Dropping(), Dropping()
    make_trainer(undisturbed).train(4, [])

    def disturb(step):
        torch.rand(step.iteration + 1)

    make_trainer(resumed).train(4, [disturb])
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    seed_step(0, 1)
    first = torch.rand(2)
    seed_step(0, 2)
    assert not torch.equal(first, torch.rand(2))


def test_loss_that_is_not_finite_stops_before_the_update():
    model = StandIn()
    samples = make_samples(4)
    told = []
    data = iter([samples, samples, samples])

    class Poisoned(StandIn):
        calls = 0

        def forward(self, samples, normalizers=None):
            self.calls += 1
            losses = super().forward(samples, normalizers)
            if self.calls == 3:
                losses["loss_loc"] = losses["loss_loc"] * math.nan
            return losses

    model = Poisoned()
    trainer = make_trainer(model, data=data)
    with pytest.raises(
        D2ScaleError, match=r"not finite at iteration 2 .*loss_cls [\d.]+, loss_loc nan"
    ) as caught:
        trainer.train(8, [told.append, lambda step: remember(model)])
    assert "\n" not in str(caught.value)
    assert len(told) == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, remembered[name])


remembered: dict = {}


def remember(model):
    remembered.update({name: value.clone() for name, value in model.state_dict().items()})


def test_scaled_gradients_update_alike():
    plain, scaled = StandIn(torch.float64), StandIn(torch.float64)
    make_trainer(plain).train(2, [])
    make_trainer(scaled, scaler=torch.amp.GradScaler("cpu", init_scale=256.0)).train(2, [])
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(scaled.state_dict()[name], value)


def test_clipping_sees_the_gradients_of_the_whole_step_unscaled():
    seen = []

    def clip(parameters):
        seen.append([parameter.grad.clone() for parameter in parameters])

    model, expected = StandIn(torch.float64), StandIn(torch.float64)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    make_trainer(model, ims_per_gpu=2, scaler=scaler, clip=clip).train(1, [])
    forward_backward(expected)([make_samples(4)])
    (found,) = seen
    norm = sum(gradient.norm() ** 2 for gradient in found)
    assert norm == pytest.approx(sum(p.grad.norm() ** 2 for p in expected.parameters()).item())
