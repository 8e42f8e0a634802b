"""``d2scale train`` tells what is wrong with a recipe before it writes or builds anything."""

import re

import pytest

from d2scale import cli
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.errors import ConfigError
from d2scale.memory.devices import SimulatedDevice
from d2scale.planning.virtual_ranks import ModelFacts
from detectron2_commands import LAZY, RETINANET

NO_FILE = "/nowhere/model.pth"


@pytest.fixture
def faults_of(tmp_path, monkeypatch, capsys):
    """Run a command on a recipe in this process and return what it blames."""
    write_shapes_dataset(tmp_path / "datasets", train_images=2, val_images=2, seed=0)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)

    def run(text, *words, command=("train", "--config-file")):
        path = tmp_path / ("recipe.py" if "LazyCall" in text else "recipe.yaml")
        path.write_text(text)
        assert cli.main([*command, str(path), *words]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "output").exists()
        return [line.removeprefix("d2scale: error: ") for line in lines if "error" in line]

    return run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["MODEL.WEIGHTS", NO_FILE], f"MODEL.WEIGHTS is '{NO_FILE}'"),
        (["--eval-only", "MODEL.WEIGHTS", NO_FILE], f"MODEL.WEIGHTS is '{NO_FILE}'"),
        (["--eval-only"], "MODEL.WEIGHTS is ''; allowed: weights to evaluate"),
        (["--eval-only", "--resume"], "MODEL.WEIGHTS is ''; allowed: weights to evaluate"),
        (["MODEL.WEIGHTS", "recipe.yaml"], "checkpoint recipe.yaml is 'unreadable'"),
        (["--eval-only", "MODEL.WEIGHTS", "recipe.yaml"], "checkpoint recipe.yaml is 'unreadable'"),
        (["MODEL.META_ARCHITECTURE", "RetinaNets"], "MODEL.META_ARCHITECTURE is 'RetinaNets'"),
        (["MODEL.BACKBONE.NAME", "resnet"], "MODEL.BACKBONE.NAME is 'resnet'"),
        (["--num-gpus", "2", "MODEL.RESNETS.NORM", "SyncBN"], "MODEL.RESNETS.NORM is 'SyncBN'"),
        (
            ["--num-gpus", "3", "D2SCALE.VIRTUAL_RANKS", "off"],
            "SOLVER.IMS_PER_BATCH is 4; allowed: a multiple of 3 processes, because detectron2's "
            "loader gives every process as many images; use another number of processes, the "
            "method per_gpu or D2SCALE.VIRTUAL_RANKS auto",
        ),
    ],
)
def test_a_yaml_recipe(faults_of, words, expected):
    (line,) = faults_of(RETINANET, *words)
    assert line.startswith(expected)


def test_a_gpu_needs_no_budget_to_be_filled(tmp_path, monkeypatch):
    from d2scale.detectron2 import memory
    from d2scale.detectron2.config import load_cfg
    from d2scale.detectron2.scaling import refuse_unplannable

    path = tmp_path / "recipe.yaml"
    path.write_text(RETINANET)
    question = (load_cfg(str(path)), 2, "max_memory", "detectron2", ModelFacts())
    with pytest.raises(ConfigError, match=r"D2SCALE\.IMS_PER_GPU is 0"):
        refuse_unplannable(*question)
    monkeypatch.setattr(memory, "_on_cuda", lambda cfg: True)
    monkeypatch.setattr(memory, "_cuda_device", lambda: SimulatedDevice(10**9))
    refuse_unplannable(*question)


def test_a_plan_tells_of_a_split_that_training_refuses(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(RETINANET)
    uneven = ["plan", str(path), "--gpus", "3"]
    assert cli.main(uneven) == 0
    assert "refuses" not in capsys.readouterr().err
    assert cli.main([*uneven, "D2SCALE.VIRTUAL_RANKS", "off"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: engine detectron2 refuses to train this: SOLVER.IMS_PER_BATCH")


def test_memory_is_not_measured_of_an_unknown_model(faults_of):
    words = ("MODEL.META_ARCHITECTURE", "X", "MODEL.BACKBONE.NAME", "Y")
    lines = faults_of(RETINANET, *words, command=["memory"])
    assert [line.split()[0] for line in lines] == [words[0], words[2]]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dataloader.train.dataset.names=none"], "dataloader.train.dataset.names is 'none'"),
        (["dataloader.test.dataset.names=none"], "dataloader.test.dataset.names is 'none'"),
        (["dataloader.train.dataset=null"], "dataloader.train.dataset is None"),
        ([f"train.init_checkpoint={NO_FILE}"], f"train.init_checkpoint is '{NO_FILE}'"),
        (
            ["--num-gpus", "2", "model.backbone.bottom_up.stages.norm=SyncBN"],
            "model.backbone.bottom_up.stages.norm is 'SyncBN'",
        ),
        # By the names of a LazyConfig, in what is told of the plan as well.
        (["lr_multiplier.scheduler.milestones=[0,0,6]"], "lr_multiplier is (0, 0)"),
        (["optimizer.lr=-1"], "optimizer.lr is -1"),
        (["model._target_=nope"], "model._target_ is 'nope'; allowed: a name that can be imported"),
        (["optimizer.lrr=1"], "arguments of SGD; did you mean optimizer.lr?"),
        (["dataloader.train.mapper.use_kp=1"], "arguments of DatasetMapper; did you mean"),
        (["train.max_itre=3"], "did you mean train.max_iter? +train.max_itre=... adds a key"),
        (["trian.max_iter=3"], "did you mean train.max_iter?"),
    ],
)
def test_a_lazy_config(faults_of, words, expected):
    (line,) = faults_of(LAZY, *words)
    assert expected in line
    assert not any(section in line for section in ("SOLVER", "MODEL", "DATASETS"))


@pytest.mark.parametrize("override", ["+train.max_itre=3", "mine.own=1", "train.ddp.static=True"])
def test_an_override_may_add_a_key(write_config, override):
    from d2scale.detectron2.lazy_config import load_lazy_config
    from d2scale.detectron2.lazy_nodes import node_faults

    cfg = load_lazy_config(write_config(LAZY, "recipe.py"), [override])
    assert node_faults(cfg) == []


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.num_classes=none"], "model"),
        (["model.backbone.bottom_up.stages.depht=18"], "model"),
        (["optimizer.weight_decay=none"], "optimizer"),
    ],
)
def test_what_a_lazy_config_cannot_build_is_one_line(write_config, overrides, key):
    from d2scale.detectron2.lazy_config import load_lazy_config
    from d2scale.detectron2.lazy_training import build_model, build_optimizer

    cfg = load_lazy_config(write_config(LAZY, "recipe.py"), overrides)
    with pytest.raises(ConfigError) as raised:
        build_optimizer(cfg, build_model(cfg))
    (line,) = str(raised.value).splitlines()
    assert line.startswith(f"{key} is ")
    assert re.search(r"Error: .*, in /.*\.py:\d+\)$", line)


def test_a_script_of_ones_own_blames_the_lazy_config(write_config, capsys):
    from d2scale.detectron2.lazy_config import load_lazy_config
    from d2scale.detectron2.training import Scaling

    overrides = ["lr_multiplier.scheduler.milestones=[0,0,6]"]
    with pytest.raises(SystemExit):
        Scaling(load_lazy_config(write_config(LAZY, "recipe.py"), overrides))
    assert "error: lr_multiplier is (0, 0)" in capsys.readouterr().err


def test_the_data_of_a_lazy_config_are_looked_for(faults_of, monkeypatch):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    name = "checks_2017_train"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).json_file = "/nowhere/instances.json"
    try:
        (line,) = faults_of(LAZY, f"dataloader.train.dataset.names=[{name}]")
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert f"dataset {name} is '/nowhere/instances.json'" in line


def test_ranks_compare_their_datasets_in_one_order(write_config, monkeypatch):
    from d2scale.detectron2 import datasets
    from d2scale.detectron2.config import load_cfg

    monkeypatch.setattr(datasets, "file_digests", dict)
    years = range(2010, 2018)
    monkeypatch.setattr(datasets, "dataset_names", lambda cfg: ())
    cfg = load_cfg(write_config(RETINANET))
    names = [f"coco_{year}_{part}" for year in years for part in ("val", "train")]
    cfg.DATASETS.TRAIN = tuple(names)
    known = [*datasets.annotation_digests(cfg)]
    assert known == sorted(known)
    assert {"coco_2014_train", "coco_2017_val"} <= {*known}
