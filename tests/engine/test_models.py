from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch

from d2scale.config import get_cfg, load_cfg
from d2scale.engine import models
from d2scale.engine.models import build_model, check_model, find_builder, load_initial_weights
from d2scale.errors import CheckpointError, ConfigError, Fault
from standins import StandIn


def build_stand_in(cfg):
    return StandIn()


def refuse(cfg):
    raise ConfigError([Fault("MODEL.SIZE", 0, "1 or more", "correct it")])


def needs_memory(cfg):
    torch.zeros(1).item()
    return StandIn()


@pytest.fixture
def cfg(monkeypatch):
    offered = [
        EntryPoint(name, f"{__name__}:{name}", models.MODELS)
        for name in ("build_stand_in", "refuse", "needs_memory")
    ]
    functions = {f.__name__: f for f in (build_stand_in, refuse, needs_memory)}
    monkeypatch.setattr(EntryPoint, "load", lambda self: functions[self.name])
    monkeypatch.setattr(models, "entry_points", lambda group: offered)
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "build_stand_in"
    return cfg


def test_model_of_an_entry_point(cfg):
    assert isinstance(build_model(cfg), StandIn)


def test_unknown_model_lists_the_known(cfg):
    with pytest.raises(ConfigError, match="build_stand_in, needs_memory, refuse"):
        find_builder("RetinaNet")


def test_metafcos_is_offered():
    assert callable(find_builder("MetaOneStageDetector"))


def test_faults_of_the_model_are_heard_early(cfg):
    check_model(cfg)
    cfg.MODEL.META_ARCHITECTURE = "needs_memory"
    check_model(cfg)
    cfg.MODEL.META_ARCHITECTURE = "refuse"
    with pytest.raises(ConfigError, match=r"MODEL\.SIZE is 0"):
        check_model(cfg)


def test_weights_by_name_and_shape(tmp_path):
    saved, model = StandIn(seed=1), StandIn(seed=2)
    path = tmp_path / "model.pth"
    torch.save({"model": saved.state_dict()}, path)
    load_initial_weights(model, str(path))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in saved.state_dict().items())
    model.score = torch.nn.Linear(9, 1)
    with pytest.raises(CheckpointError, match="1 shapes that differ"):
        load_initial_weights(model, str(path))


def test_models_own_loader_is_asked_first(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"its own format")
    asked = []
    model = StandIn()
    model.load_weights = asked.append
    load_initial_weights(model, str(path))
    assert asked == [path]


def test_no_weights():
    load_initial_weights(StandIn(), "")


def test_a_model_with_other_classes_than_the_datasets_is_a_fault():
    cfg = load_cfg("d2scale://MetaFCOS/small-cpu.yaml")
    check_model(cfg)
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    with pytest.raises(ConfigError, match="60, the classes of coco_pretrain_train_base") as raised:
        check_model(cfg)
    assert len(raised.value.faults) == 1
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ()
    check_model(cfg)
