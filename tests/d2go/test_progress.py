"""What resuming makes of a loaded checkpoint, without a training."""

import pytest
import torch
from torch import nn


@pytest.fixture
def cfg():
    from d2scale.d2go.runner import Runner

    cfg = Runner.get_default_cfg()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 4, 10, ()
    cfg.SOLVER.WARMUP_ITERS = 0
    return cfg


class Checkpointer:
    """Loads what a run with a learning rate of 1.0 and channels-last weights saved."""

    save_dir = "out"
    _load_file = None  # it reads none

    def __init__(self, optimizer, record, saved):
        self._optimizer = optimizer
        self._record = record
        self._saved = saved

    def has_checkpoint(self):
        return True

    def get_checkpoint_file(self):
        return "out/model_0000003.pth"

    def resume_or_load(self, path, *, resume):
        self._optimizer.load_state_dict(self._saved)
        self._record.load_state_dict(self._record.state_dict())
        return {"iteration": 3}


def resume(cfg):
    from detectron2.solver import build_lr_scheduler

    from d2scale.detectron2.progress import ProgressRecord, resume_by_images

    layers = [nn.Conv2d(2, 2, 3, bias=False) for _ in range(2)]
    theirs = torch.optim.SGD(
        layers[0].to(memory_format=torch.channels_last).parameters(), lr=1.0, momentum=0.9
    )
    layers[0].weight.grad = torch.randn_like(layers[0].weight)
    theirs.step()
    optimizer = torch.optim.SGD(layers[1].parameters(), lr=0.1, momentum=0.5)
    scheduler = build_lr_scheduler(cfg, optimizer)
    record = ProgressRecord(cfg)
    checkpointer = Checkpointer(optimizer, record, theirs.state_dict())
    resume_by_images(checkpointer, record, optimizer, scheduler, max_iter=10)
    content = checkpointer.resume_or_load("", resume=True)
    return content, optimizer, layers


def test_state_is_kept_with_the_settings_and_strides_of_this_run(cfg):
    content, optimizer, (theirs, ours) = resume(cfg)
    assert content["iteration"] == 3
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"]) == pytest.approx((0.1, 0.5))
    momentum = optimizer.state[ours.weight]["momentum_buffer"]
    assert torch.equal(momentum, theirs.weight.grad)
    assert momentum.stride() == ours.weight.stride() != theirs.weight.stride()


def record_of(cfg, ims_per_batch, rule, **loaded):
    """Return a record that has loaded one that ``loaded`` changes, of a recipe of 4 images."""
    from d2scale.detectron2.progress import ProgressRecord
    from d2scale.planning.progress import recipe_of

    recipe = recipe_of(cfg)
    cfg = cfg.clone()
    cfg.SOLVER.IMS_PER_BATCH, cfg.D2SCALE.LR_RULE = ims_per_batch, rule
    cfg.D2SCALE.RECIPE_IMS_PER_BATCH = 4 if rule == "gain" else 0
    if rule != "gain":
        cfg.SOLVER.MAX_ITER = 40 // ims_per_batch
    record = ProgressRecord(cfg, recipe)
    record._plan |= {"lr_rule": rule, "batch_ratio": ims_per_batch / 4}
    if loaded:
        record.load_state_dict(loaded)
    return record


def stopped_by_gain(cfg):
    """Return the record after two steps that were worth 4.25 of the recipe's: iteration 2."""
    record = record_of(cfg, 12, "gain")
    record.clock.resume(4.25, 17.0, {**record.clock.state_dict(), "steps": 2, "gain": 2.0})
    record.images_seen = 24
    return record.state_dict()


@pytest.mark.parametrize(
    ("ims_per_batch", "rule", "first", "tau"),
    [
        (12, "gain", 3, 4.25),  # iteration 3 takes no step
        (8, "gain", 3, 4.25),
        (4, "linear", 4, 4.0),  # 23 images are left: 6 steps
    ],
)
def test_by_the_gain_rule_the_recipes_images_count(cfg, ims_per_batch, rule, first, tau):
    record = record_of(cfg, ims_per_batch, rule, **stopped_by_gain(cfg))
    assert record.next_iteration(2) == first
    assert (record.clock.iterations, record.clock.recipe_images) == (tau, 17.0)
    assert (record.images_seen, record.clock.steps) == (24, 2)
    # One iteration more, and on by the gain rule: from there on with what the images are worth.
    again = record_of(cfg, 4, "gain", **record.state_dict())
    if rule == "linear":
        assert again.next_iteration(4) == 5
        assert (again.clock.iterations, again.images_seen) == (5.25, 28)
    else:
        assert again.next_iteration(3) == 4
        assert (again.clock.iterations, again.images_seen) == (4.25, 24)


def test_a_run_without_the_rule_goes_on_by_it(cfg):
    # 3 steps of 6 images.
    record = record_of(cfg, 12, "gain", **record_of(cfg, 6, "linear").state_dict())
    record._cfg.D2SCALE.ALLOW_CHANGED_RECIPE = True
    assert record.next_iteration(2) == 4
    assert (record.clock.iterations, record.images_seen) == (4.5, 18)


def test_another_rule_is_refused_unless_told(cfg):
    from d2scale.errors import CheckpointError

    record = record_of(cfg, 8, "linear", **stopped_by_gain(cfg))
    with pytest.raises(CheckpointError, match=r"LR_RULE is 'linear'; allowed: 'gain'"):
        record.next_iteration(2)


def test_machines_without_a_shared_folder_are_refused(cfg, monkeypatch, capsys):
    from d2scale.step import ranks

    monkeypatch.setattr(ranks, "same_on_all_ranks", lambda value: False)
    with pytest.raises(SystemExit, match="2"):
        resume(cfg)
    assert "a folder shared by all ranks" in capsys.readouterr().err
