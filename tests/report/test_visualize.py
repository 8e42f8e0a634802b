from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from d2scale.cli import main
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.models import new_model
from d2scale.errors import CheckpointError, ConfigError, DataError
from d2scale.report import visualize as module
from d2scale.report.drawing import class_colour
from d2scale.report.visualize import visualize

OPTIONS = ("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of a small MetaFCOS with random weights."""
    folder = tmp_path_factory.mktemp("run")
    cfg = load_cfg("d2scale://MetaFCOS/small-cpu.yaml", OPTIONS)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    content = {"model": new_model(cfg).state_dict(), "iteration": 0, "images_seen": 8}
    torch.save(content, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes_dataset(tmp_path_factory.mktemp("shapes"), 1, 10, image_size=(64, 96))


@pytest.fixture(autouse=True)
def _datasets(shapes, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))


class Stub(nn.Module):
    """Finds one box of class 2 in the upper left quarter, and one that nobody believes."""

    def forward(self, samples):
        (sample,) = samples
        assert sample["image"].dtype == torch.uint8
        assert min(sample["image"].shape[1:]) <= 128
        width, height = sample["width"], sample["height"]
        boxes = [[4, 20, width / 2, height / 2], [0, 0, width, height]]
        return [
            {
                "boxes": torch.tensor(boxes),
                "scores": torch.tensor([0.8, 0.2]),
                "classes": torch.tensor([2, 5]),
            }
        ]


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(module, "build_model", lambda cfg: Stub())
    monkeypatch.setattr(module, "load_initial_weights", lambda model, path: None)


def near(picture, colour):
    """Return where a picture, which JPEG has blurred, has about this colour: (n, 2) of y x."""
    return np.argwhere((np.abs(picture.astype(int) - np.array(colour)) < 70).all(axis=2))


def test_a_run_is_drawn_on_test_images_beside_the_truth(run_folder, tmp_path):
    drawn = visualize(run_folder, tmp_path / "out", score_threshold=0.0)
    assert len(drawn.files) == 8
    assert drawn.notes == ()
    assert sorted(drawn.files) == sorted((tmp_path / "out").iterdir())
    for path in drawn.files:
        with Image.open(path) as picture:
            width, height = picture.size
        assert 64 <= height <= 96
        assert 2 * 64 < width <= 2 * 96 + 8


def test_boxes_lie_in_pixels_of_the_image_and_only_sure_ones(run_folder, tmp_path, stub):
    image = tmp_path / "grey.png"
    Image.new("RGB", (400, 300), (90, 90, 90)).save(image)
    drawn = visualize(run_folder, tmp_path / "out", inputs=[image])
    picture = np.asarray(Image.open(drawn.files[0]))
    assert picture.shape == (300, 400, 3)
    places = near(picture, class_colour(2))
    assert (abs(places.max(axis=0) - [150, 200]) <= 2).all()
    assert len(near(picture, class_colour(5))) < 100
    both = visualize(run_folder, tmp_path / "out", inputs=[image], score_threshold=0.1)
    assert both.files == drawn.files
    assert len(near(np.asarray(Image.open(both.files[0])), class_colour(5))) > 1000


class Corners(nn.Module):
    """Finds a box in the upper left of all that it is shown."""

    def forward(self, samples):
        assert all(sample["image"].shape[1:] == (128, 128) for sample in samples[1:])
        box = torch.tensor([[4.0, 20, 44, 60]])
        found = {"boxes": box, "scores": torch.ones(1), "classes": torch.tensor([2])}
        return [found for _ in samples]


def test_a_large_image_is_drawn_from_its_tiles(run_folder, tmp_path, stub, monkeypatch):
    monkeypatch.setattr(module, "build_model", lambda cfg: Corners())
    image, small = tmp_path / "large.png", tmp_path / "small.png"
    Image.new("RGB", (400, 300), (90, 90, 90)).save(image)
    Image.new("RGB", (160, 160), (90, 90, 90)).save(small)
    words = ["visualize", str(run_folder), "--input", str(image), "--input", str(small)]
    assert main([*words, "-o", str(tmp_path / "out"), "--tile", "160", "--overlap=0"]) == 0
    picture = np.asarray(Image.open(tmp_path / "out" / "large.jpg"))
    places = near(picture, class_colour(2))
    for x, y in itertools.product((0, 120, 240), (0, 140)):
        inside = (places >= (y + 18, x + 2)).all(axis=1) & (places <= (y + 62, x + 46)).all(axis=1)
        assert inside.sum() > 100
    assert len(near(np.asarray(Image.open(tmp_path / "out" / "small.jpg")), class_colour(2))) > 100


def test_truth_is_left_and_detections_are_right(run_folder, tmp_path, stub):
    drawn = visualize(run_folder, tmp_path / "out")
    picture = np.asarray(Image.open(drawn.files[0]))
    middle = picture.shape[1] // 2
    right = near(picture[:, middle:], class_colour(2))
    assert len(right) > len(near(picture[:, :middle], class_colour(2))) + 20


def test_a_checkpoint_folders_and_unreadable_images(run_folder, tmp_path, stub):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.JPG"):
        Image.new("RGB", (64, 64)).save(folder / name, format="png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    again = tmp_path / "a.png"
    Image.new("L", (64, 64)).save(again)
    drawn = visualize(run_folder / "model_final.pth", tmp_path / "out", inputs=[folder, again])
    assert [path.name for path in drawn.files] == ["a.jpg", "b.jpg", "a-2.jpg"]
    (note,) = drawn.notes
    assert "broken.jpg" in note


@pytest.mark.parametrize("content", [None, b"no image"])
def test_without_a_readable_image_the_command_says_so(run_folder, tmp_path, capsys, content):
    image = tmp_path / "image.jpg"
    if content:
        image.write_bytes(content)
    arguments = ["visualize", str(run_folder), "--input", str(image), "-o", str(tmp_path / "out")]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert "image.jpg" in printed.err
    assert len(printed.err.splitlines()) == 1


def test_the_command_prints_what_it_wrote(run_folder, tmp_path, capsys, stub):
    image = tmp_path / "grey.png"
    Image.new("RGB", (64, 64)).save(image)
    arguments = ["visualize", str(run_folder), "--input", str(image)]
    arguments += ["-o", str(tmp_path / "out"), "MODEL.DEVICE", "cpu"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'grey.jpg'}\n"


def test_what_cannot_be_drawn_is_reported(run_folder, tmp_path):
    with pytest.raises(CheckpointError, match="folder of a run"):
        visualize(tmp_path / "nowhere", tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="with a checkpoint"):
        visualize(empty, tmp_path / "out")
    lonely = empty / "model.pth"
    lonely.write_bytes((run_folder / "model_final.pth").read_bytes())
    with pytest.raises(ConfigError, match="--config-file"):
        visualize(lonely, tmp_path / "out")
    with pytest.raises(DataError, match="--input"):
        visualize(run_folder, tmp_path / "out", inputs=[empty])
    with pytest.raises(ConfigError, match="--score-threshold"):
        visualize(run_folder, tmp_path / "out", score_threshold=1.5)
    with pytest.raises(DataError, match=r"DATASETS\.TEST"):
        visualize(run_folder, tmp_path / "out", opts=["DATASETS.TEST", "()"])
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model_are_refused(run_folder, tmp_path):
    config = tmp_path / "other.yaml"
    config.write_text("_BASE_: d2scale://MetaFCOS/small-cpu.yaml\nMODEL: {FPN: {OUT_CHANNELS: 96}}")
    with pytest.raises(CheckpointError):
        visualize(run_folder, tmp_path / "out", config_file=str(config))


def test_a_config_of_another_engine_is_one_line(run_folder, tmp_path):
    other = tmp_path / "config.yaml"
    other.write_text("SOMEBODYS: {" + ", ".join(f"KEY{i}: {i}" for i in range(50)) + "}")
    with pytest.raises(ConfigError, match="default engine") as raised:
        visualize(run_folder, tmp_path / "out", config_file=str(other))
    assert len(raised.value.faults) == 1
    other.write_text("SOLVER: {BASE_LRR: 1}")
    with pytest.raises(ConfigError, match="BASE_LR"):
        visualize(run_folder, tmp_path / "out", config_file=str(other))


def test_a_folder_that_cannot_be_written_is_reported(run_folder, tmp_path, stub):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--output"):
        visualize(run_folder, tmp_path / "file")
    (tmp_path / "out" / "000000000001.jpg").mkdir(parents=True)
    image = tmp_path / "000000000001.png"
    Image.new("RGB", (64, 64)).save(image)
    with pytest.raises(ConfigError, match="--output"):
        visualize(run_folder, tmp_path / "out", inputs=[image])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["000000000001.jpg"]
