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

    def __init__(self, optimizer, record, saved):
        self._optimizer = optimizer
        self._record = record
        self._saved = saved

    def has_checkpoint(self):
        return True

    def resume_or_load(self, path, *, resume):
        self._optimizer.load_state_dict(self._saved)
        self._record.load_state_dict(self._record.state_dict())
        return {"iteration": 3}


def resume(cfg):
    from detectron2.solver import build_lr_scheduler

    from d2scale.d2go.progress import ProgressRecord, resume_by_images

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


def test_machines_without_a_shared_folder_are_refused(cfg, monkeypatch, capsys):
    from d2scale.step import ranks

    monkeypatch.setattr(ranks, "same_on_all_ranks", lambda value: False)
    with pytest.raises(SystemExit, match="2"):
        resume(cfg)
    assert "a folder shared by all ranks" in capsys.readouterr().err
