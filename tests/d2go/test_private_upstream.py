"""The private parts of d2go in ``private_upstream`` still do what they did.

Tried with detectron2 02b5c4e, d2go f4ac156 and mobile-vision bb8465c, on torch 2.5.1 and 2.9.1.
"""

import inspect

import pytest
from torch import nn


def test_the_ema_holds_state_where_it_acts():
    from d2go.modeling import ema
    from d2go.runner import GeneralizedRCNNRunner
    from detectron2.engine import HookBase, SimpleTrainer, hooks

    from d2scale.d2go.private_upstream import state_holders

    class Acting(HookBase):
        def after_backward(self):
            pass

    cfg = GeneralizedRCNNRunner.get_default_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL_EMA.ENABLED = True
    model = nn.Linear(1, 1)
    ema.may_build_model_ema(cfg, model)
    after_step = ema.EMAHook(cfg, model)
    cfg.MODEL_EMA.AFTER_BACKWARD = True
    after_backward = ema.EMAHook(cfg, model)
    acting = Acting()
    trainer = SimpleTrainer(model, [], None)
    trainer.register_hooks([hooks.IterationTimer(), after_step, after_backward, acting])
    holders = state_holders(trainer)
    assert holders == [after_backward, after_backward.ema_updater, model.ema_state, acting]
    assert {"_num_updates", "state"} <= {key for holder in holders for key in vars(holder)}


def test_the_decay_of_the_ema_is_set_where_it_acts():
    from d2go.modeling import ema
    from d2go.runner import GeneralizedRCNNRunner
    from detectron2.engine import SimpleTrainer

    from d2scale.d2go.private_upstream import set_ema_decay

    cfg = GeneralizedRCNNRunner.get_default_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL_EMA.ENABLED = cfg.MODEL_EMA.AFTER_BACKWARD = True
    model = nn.Linear(1, 1)
    ema.may_build_model_ema(cfg, model)
    hook = ema.EMAHook(cfg, model)
    trainer = SimpleTrainer(model, [], None)
    trainer.register_hooks([hook])
    hook.before_train()
    set_ema_decay(trainer, 0.25)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    nn.init.constant_(model.weight, before["weight"].item() + 1.0)
    trainer.after_backward()
    assert model.ema_state.state["weight"].item() == pytest.approx(before["weight"].item() + 0.75)


def test_the_runner_overrides_a_method_of_d2go():
    from d2go.runner import GeneralizedRCNNRunner

    from d2scale.d2go.runner import Runner

    theirs, ours = (
        list(inspect.signature(runner._get_trainer_hooks).parameters)
        for runner in (GeneralizedRCNNRunner, Runner)
    )
    assert theirs == ours
