from __future__ import annotations

import json

import pytest

from d2scale.cli import main

TINY = (
    *("INPUT.MIN_SIZE_TRAIN", "[32]", "INPUT.MIN_SIZE_TEST", "32", "INPUT.MAX_SIZE_TEST", "64"),
    *("MODEL.FPN.OUT_CHANNELS", "32", "SOLVER.IMS_PER_BATCH", "4"),
)


def test_both_parts_are_measured_and_written(recipes, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))  # there is nothing in it
    path = str(recipes / "small-cpu.yaml")
    target = tmp_path / "speed.json"
    command = ["benchmark", path, "--images", "3", "--steps", "2", "-o", str(target), *TINY]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "seconds an image" in printed.out
    written = json.loads(target.read_text())
    assert written["facts"]["weights"] == "random"
    assert written["inference"]["images"] == 3
    assert written["inference"]["data"].startswith("random images")
    speed = written["inference"]["images a second"]
    assert speed * written["inference"]["seconds an image"] == pytest.approx(1)
    assert written["training"]["images a step"] == 2  # a batch of 4 on 2 ranks
    assert written["training"]["steps"] == 2
    assert 0 < written["training"]["peak GiB"] < 0.5


def test_one_part_as_json(recipes, capsys):
    options = ["--only", "training", "--ims-per-gpu", "1", "--steps", "1", "--data", "random"]
    path = str(recipes / "small-cpu.yaml")
    assert main(["benchmark", path, "--format", "json", *options, *TINY]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["inference"] == {}
    assert found["training"]["images a step"] == 1


def test_weights_that_are_not_there_are_told(recipes, capsys):
    options = ["--only", "training", "--steps", "1", "--data", "random"]
    path = str(recipes / "small-cpu.yaml")
    opts = [*TINY, "MODEL.WEIGHTS", "nowhere.pth"]
    assert main(["benchmark", path, *options, *opts]) == 0
    assert "random (nowhere.pth is not on this machine)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "faults"),
    [
        (["--images", "0", "--steps", "-1", "--warmup", "-1"], 3),
        (["--ims-per-gpu", "-1", "SOLVER.OPTIMIZER", "nonsense"], 2),
        (["--data", "real"], 1),
        (["MODEL.FCOS.NUM_CLASSES", "-1"], 1),
        (["MODEL.DEVICE", "tpu"], 1),
        (["SOLVER.AMP.ENABLED", "True"], 1),  # float16 is what the config says
    ],
)
def test_mistakes_are_told_one_to_a_line(recipes, capsys, tmp_path, monkeypatch, options, faults):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert main(["benchmark", str(recipes / "small-cpu.yaml"), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == faults
    assert all(line.startswith("d2scale: error: ") for line in printed.err.splitlines())
