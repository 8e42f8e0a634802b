"""``d2scale train`` tells what is wrong with a recipe before it writes or builds anything."""

import pytest

from d2scale import cli
from d2scale.coco.shapes import write_shapes_dataset
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
    ],
)
def test_a_lazy_config(faults_of, words, expected):
    (line,) = faults_of(LAZY, *words)
    assert expected in line
    assert not any(section in line for section in ("SOLVER", "MODEL", "DATASETS"))


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
