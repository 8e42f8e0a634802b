"""Which trainers let d2scale take their steps."""

import pytest
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
