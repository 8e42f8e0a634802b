import dataclasses
import json

import pytest

from d2scale import demo
from d2scale.cli import main
from d2scale.engine.data.catalog import ROOT_VARIABLE
from d2scale.synthetic import write_shapes_dataset


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """The demo on a few images and steps, without touching this process's environment."""
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "nowhere"))
    monkeypatch.setattr(demo, "TRAIN_IMAGES", 24)
    monkeypatch.setattr(demo, "VAL_IMAGES", 2)
    short = ("SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)", "SOLVER.WARMUP_ITERS", "1")
    monkeypatch.setattr(
        demo,
        "EXPERIMENTS",
        tuple(
            dataclasses.replace(experiment, options=(*experiment.options, *short))
            for experiment in demo.EXPERIMENTS
        ),
    )


def test_the_demo_trains_all_three_and_compares_them(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(["demo", "--output-dir", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "| SOLVER.MAX_ITER                                 | 90000        | 5760000" in printed
    rows = {
        cells[0]: cells[1:]
        for line in printed[printed.index("side by side") :].splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")]) and len(cells) == 4
    }
    assert rows["total batch"] == ["8", "8", "16"]
    assert rows["MAX_ITER"] == ["4", "4", "2"]
    assert rows["images seen"] == ["32", "32", "32"]
    first, second, _ = map(float, rows["final total_loss"])
    assert first == pytest.approx(second, rel=1e-4)
    assert {"AP", "AP50", "ARl"} <= set(rows)
    assert (folder / "experiment-3-large-batch" / "model_final.pth").exists()


def test_coco_is_cut_to_a_few_images_and_not_copied(tmp_path, monkeypatch):
    write_shapes_dataset(tmp_path / "real", train_images=30, val_images=4)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "real"))
    assert "COCO found" in demo._data_at_hand(tmp_path / "demo")
    subset = tmp_path / "demo" / "coco-subset" / "coco"
    content = json.loads((subset / "annotations" / "instances_train2017.json").read_text())
    assert len(content["images"]) == 24
    assert {a["image_id"] for a in content["annotations"]} <= {i["id"] for i in content["images"]}
    assert (subset / "train2017").is_symlink()
    assert all((subset / "train2017" / i["file_name"]).exists() for i in content["images"])


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo", "--output-dir", str(tmp_path)]) == 2
    assert "--output-dir" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
