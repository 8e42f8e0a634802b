"""Which trainers let d2scale take their steps."""

import importlib

import pytest
import torch
import torch.distributed as dist
from torch import nn


def trainer_of(kind=None, model=None):
    from detectron2.engine import SimpleTrainer

    return (kind or SimpleTrainer)(model or nn.Linear(1, 1), [], None)


def test_detectron2s_own_trainer_has_no_obstacle():
    from d2scale.detectron2.run_step import RunStep

    assert RunStep.obstacle_of(trainer_of()) == ""


def test_a_trainer_with_steps_of_its_own_is_named():
    from detectron2.engine import DefaultTrainer, SimpleTrainer

    from d2scale.detectron2.run_step import RunStep

    class Adversarial(SimpleTrainer):
        pass

    class Own(DefaultTrainer):
        def __init__(self):
            self._trainer = trainer_of()

        def run_step(self):
            pass

    assert RunStep.obstacle_of(trainer_of(Adversarial)) == "the trainer Adversarial"
    assert RunStep.obstacle_of(Own()) == "the run_step of Own"


def test_a_model_that_fully_shard_has_split_is_one(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    from d2scale.detectron2.private_upstream import FULLY_SHARDED
    from d2scale.detectron2.run_step import RunStep

    fully_shard = importlib.import_module(FULLY_SHARDED[-1].__module__).fully_shard
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = fully_shard(nn.Linear(1, 1), mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()
    assert RunStep.obstacle_of(trainer_of(model=model)) == "the wrapper FSDPLinear"


def test_fully_sharded_models_are_refused_in_one_line(monkeypatch, capsys, tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg

    from d2scale.detectron2.run_step import RunStep
    from d2scale.detectron2.training import Scaling

    class FullyShardedDataParallel(nn.Linear):
        """Stands for torch's, which needs GPUs."""

    monkeypatch.setattr(RunStep, "wrappers", (FullyShardedDataParallel,))
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = "cpu", str(tmp_path / "out")
    trainer = trainer_of(model=FullyShardedDataParallel(1, 1))
    with pytest.raises(SystemExit, match="2"):
        Scaling(cfg).take_steps(trainer, DetectionCheckpointer(trainer.model))
    (line,) = capsys.readouterr().err.splitlines()
    assert "what takes the steps is 'the wrapper FullyShardedDataParallel'" in line
    assert not (tmp_path / "out").exists()


def test_a_mistake_that_a_step_meets_is_one_line(capsys, caplog, tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.engine import SimpleTrainer

    from d2scale.detectron2.training import Scaling

    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = "cpu", str(tmp_path)
    model = nn.Linear(1, 1)
    # What the loader yields is no list of samples.
    trainer = SimpleTrainer(model, [nn.Linear(1, 1)], torch.optim.SGD(model.parameters(), lr=0.1))
    Scaling(cfg).take_steps(trainer, DetectionCheckpointer(model, str(tmp_path), trainer=trainer))
    with pytest.raises(SystemExit, match="2"):
        trainer.train(0, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("d2scale: error: a batch of the training loader")
    assert "Exception during training" not in caplog.text


@pytest.mark.parametrize("rank", [0, 1])
def test_of_a_mistake_that_many_ranks_meet_rank_0_tells_first(monkeypatch, rank):
    from d2scale.detectron2.user_errors import exit_alone_on_user_error
    from d2scale.errors import D2ScaleError
    from d2scale.step import ranks

    waits = []
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(SystemExit, match="2"), exit_alone_on_user_error():
        raise D2ScaleError("wrong")
    assert bool(sum(waits)) == (rank > 0)
