"""Trainings of the default engine on a user's own data."""

from __future__ import annotations

import json

import pytest
import torch

from d2scale.cli import main
from d2scale.engine.config import load_cfg
from d2scale.engine.run import train
from d2scale.errors import ConfigError
from d2scale.launch.launch import Topology
from d2scale.report.comparison import evaluate_runs
from d2scale.report.runs import read_run
from own_data import RECIPE, OwnData, injection

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path):
    return OwnData(tmp_path)


@pytest.fixture
def make_cfg(data, tmp_path, write_config):
    def make(*opts, folder="run"):
        path = write_config(RECIPE + injection(data))
        return load_cfg(path, ["OUTPUT_DIR", str(tmp_path / folder), *map(str, opts)])

    return make


def test_spawned_ranks_know_a_configs_own_dataset(data, make_cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = make_cfg()
    cfg.D2GO_DATA.DATASETS.COCO_INJECTION.JSON_FILES = ["labels.json"]
    cfg.D2GO_DATA.DATASETS.COCO_INJECTION.IM_DIRS = ["images"]
    results = train(cfg, Topology(2))
    assert "bbox/AP" in results
    weights = torch.load(tmp_path / "run/model_final.pth", weights_only=True)["model"]
    head = next(value for name, value in weights.items() if name.endswith("cls_logits.weight"))
    assert head.shape[0] == data.classes
    # What the run leaves behind is complete: it can be drawn and reported from any folder.
    monkeypatch.chdir("/")
    written = load_cfg(str(tmp_path / "run/config.yaml"))
    assert data.classes == written.MODEL.FCOS.NUM_CLASSES
    assert main(["visualize", str(tmp_path / "run"), "-o", str(tmp_path / "drawn")]) == 0
    notes = []
    run = read_run(tmp_path / "run", "run")
    (evaluated,) = evaluate_runs([run], notes)
    assert (run.engine, evaluated.images, notes) == ("d2scale", 6, [])


def test_resuming_with_other_annotations_is_refused(data, make_cfg):
    opts = ("DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1)
    train(make_cfg(*opts))
    data.content["annotations"].pop()
    data.write()
    told = r"annotations of mine \(digest\) is .*; allowed: .*, as in"
    with pytest.raises(ConfigError, match=told):
        train(make_cfg(*opts), resume=True)
    train(make_cfg(*opts, "D2SCALE.ALLOW_CHANGED_RECIPE", True), resume=True)


@pytest.mark.parametrize("command", ["train", "plan", "memory", "benchmark", "advise"])
def test_every_command_refuses_lists_of_unequal_length(
    command, data, tmp_path, write_config, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = injection(data).replace(json.dumps([str(data.images)]), "[]")
    path = write_config(RECIPE + text)
    words = ["--config-file", path] if command == "train" else [path]
    before = sorted(tmp_path.iterdir())
    assert main([command, *words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if line.startswith("d2scale: error: ")] == [told[-1]]
    assert "COCO_INJECTION.IM_DIRS is []; allowed: 1 of them" in told[-1]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("part", ["json_file", "images"])
def test_a_missing_file_or_folder_is_one_line(data, write_config, tmp_path, capsys, part):
    path = write_config(RECIPE.replace("TEST: [mine]", "TEST: []") + injection(data))
    getattr(data, part).rename(tmp_path / "moved")
    words = ["train", "--config-file", path, "OUTPUT_DIR", str(tmp_path / "run")]
    assert main(words) == 2
    told = capsys.readouterr().err.splitlines()
    (line,) = [line for line in told if line.startswith("d2scale: error: ")]
    assert f"{getattr(data, part)} not found; correct the path" in line
    assert not (tmp_path / "run").exists()


def test_a_wrong_number_of_classes_is_one_line_with_the_right_one(data, make_cfg, tmp_path):
    with pytest.raises(ConfigError) as raised:
        train(make_cfg("MODEL.FCOS.NUM_CLASSES", 3))
    (line,) = str(raised.value).splitlines()
    assert line.startswith("MODEL.FCOS.NUM_CLASSES is 3; allowed: 6, the classes of mine; leave")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "DATASETS.TRAIN", "('mine',)"],
        ["memory"],
        ["benchmark", "--data", "real", "--images", "1", "--steps", "1"],
    ],
)
def test_other_commands_know_the_dataset_too(data, write_config, words, capsys):
    command, *options = words
    assert main([command, write_config(RECIPE + injection(data)), *options]) == 0
    if command == "benchmark":
        assert "mine" in capsys.readouterr().out
