"""Hooks between backward and update, in a step that runs out of memory and is taken again."""

import pytest
import torch
from torch import nn

from d2scale.step.out_of_memory import OutOfMemoryError

STEPS = 4


class Model(nn.Module):
    """Mean of a linear loss over the images, so that any split gives the same gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.register_buffer("forwards", torch.zeros(1))

    def forward(self, samples):
        self.forwards += len(samples)
        inputs = torch.stack([sample["inputs"] for sample in samples])
        return {"loss": self.layer(inputs).square().sum(dim=1).mean()}


def loader():
    generator = torch.Generator().manual_seed(0)
    return [[{"inputs": torch.randn(3, generator=generator)} for _ in range(4)]] * STEPS


class FailingOnce(torch.optim.SGD):
    """Runs out of memory in its second step, after it has changed the weights."""

    calls = 0

    def step(self, closure=None):
        super().step(closure)
        self.calls += 1
        if self.calls == 2:
            raise OutOfMemoryError("out of memory")


def halving_hook():
    from detectron2.engine import HookBase

    class Halve(HookBase):
        def __init__(self):
            self.steps = 0
            self.norms = torch.zeros(())

        def after_backward(self):
            self.steps += 1
            for parameter in self.trainer.model.parameters():
                parameter.grad.mul_(0.5)
                self.norms += parameter.grad.norm()

    return Halve()


def train(optimizer_class, **settings):
    """Train with d2go's EMA between backward and update; return model and hooks."""
    from d2go.modeling import ema
    from detectron2.engine import SimpleTrainer

    from d2scale.d2go.run_step import D2GoRunStep
    from d2scale.d2go.runner import Runner

    cfg = Runner.get_default_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.MODEL_EMA.ENABLED = cfg.MODEL_EMA.AFTER_BACKWARD = True
    cfg.MODEL_EMA.DECAY, cfg.MODEL_EMA.DECAY_WARM_UP_FACTOR = 0.9, 2
    for key, value in settings.items():
        cfg.D2SCALE[key] = value
    model = Model()
    ema.may_build_model_ema(cfg, model)
    trainer = SimpleTrainer(model, loader(), optimizer_class(model.parameters(), lr=0.1))
    hooks = [ema.EMAHook(cfg, model), halving_hook()]
    trainer.register_hooks([*hooks, D2GoRunStep(cfg, checkpointer=None)])
    trainer.train(0, STEPS)
    return model, hooks


@pytest.mark.parametrize("settings", [{}, {"IMS_PER_GPU": 2}])
def test_hooks_act_on_every_attempt_and_count_a_step_once(settings):
    # d2go's own step, which nothing interrupts.
    expected, (expected_ema, expected_halve) = train(torch.optim.SGD, ON_OOM="raise")
    model, (ema, halve) = train(FailingOnce, **settings)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    torch.testing.assert_close(ema.ema.state, expected_ema.ema.state)
    assert ema.ema_updater._num_updates == expected_ema.ema_updater._num_updates == STEPS
    assert halve.steps == expected_halve.steps == STEPS
    torch.testing.assert_close(halve.norms, expected_halve.norms)


def test_steps_that_never_fit_leave_the_ema_of_the_last_good_one():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise OutOfMemoryError("out of memory")

    from d2go.modeling import ema

    seen = []
    init_state = ema.EMAUpdater.init_state

    def init(updater, built):
        init_state(updater, built)
        seen.append((updater, {name: value.clone() for name, value in updater.state.state.items()}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema.EMAUpdater, "init_state", init)
        with pytest.raises(SystemExit, match="2"):
            train(Failing)
    ((updater, before),) = seen
    torch.testing.assert_close(updater.state.state, before)
    assert updater._num_updates == 0
