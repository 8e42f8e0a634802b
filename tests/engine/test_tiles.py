from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from d2scale.cli import main
from d2scale.coco.dataset import load_dataset
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine import tiles as module
from d2scale.engine.data.transforms import ResizeAndFlip
from d2scale.engine.evaluation import evaluate_datasets
from d2scale.engine.models import new_model
from d2scale.engine.tiles import Found, TiledDetector, Tiling, covered_pieces

UNCHANGED = ResizeAndFlip((0,), "choice", 10_000, False)


class Squares(nn.Module):
    """Detects squares of one colour; the colour's number is the class, its area the score."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, samples):
        assert not self.training
        self.batches.append([tuple(sample["image"].shape[1:]) for sample in samples])
        return [self.detect(sample) for sample in samples]

    def detect(self, sample):
        image = sample["image"][0]
        scale = [sample["width"] / image.shape[1], sample["height"] / image.shape[0]]
        found = []
        for colour in image.unique().tolist():
            rows, columns = torch.nonzero(image == colour, as_tuple=True)
            if colour:
                ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                box = torch.tensor([float(end) for end in ends]) * torch.tensor(scale * 2)
                found.append((box, len(rows) / 1e6, colour))
        boxes, scores, classes = zip(*found, strict=True) if found else ((), (), ())
        return {
            "boxes": torch.stack(boxes) if found else torch.zeros(0, 4),
            "scores": torch.tensor(scores),
            "classes": torch.tensor(classes, dtype=torch.int64),
        }


def picture(height, width, *squares):
    """Squares as x, y, side, colour, and the sample of their picture."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x, y, side, colour in squares:
        image[:, y : y + side, x : x + side] = colour
    return {"image": image, "height": height, "width": width, "image_id": 1}


def detector(size, overlap=0.25, *, whole_image=True, max_dets=100, resizing=UNCHANGED):
    tiling = Tiling(size, overlap, whole_image)
    return TiledDetector(Squares(), tiling, resizing, max_dets).eval()


@settings(max_examples=40, deadline=None)
@given(st.integers(32, 900), st.integers(1, 2000), st.integers(1, 2000), st.floats(0, 0.9))
def test_tiles_cover_an_image_and_overlap_as_asked(size, height, width, overlap):
    tiling = Tiling(size, overlap)
    tiles = tiling.tiles(height, width)
    assert len(set(tiles)) == len(tiles)
    assert {(t.x1 - t.x0, t.y1 - t.y0) for t in tiles} == {(min(size, width), min(size, height))}
    for length, starts in ((width, {t.x0 for t in tiles}), (height, {t.y0 for t in tiles})):
        ordered = sorted(starts)
        assert (ordered[0], ordered[-1]) == (0, max(0, length - size))
        shared = [a + size - b for a, b in itertools.pairwise(ordered)]
        assert all(pixels >= tiling.overlap_pixels for pixels in shared)
    assert tiling.cuts(height, width) == (len(tiles) > 1)


def test_an_object_in_several_tiles_is_found_once():
    squares = [(50, 40, 16, 3), (140, 30, 20, 4), (84, 90, 12, 5), (2, 120, 10, 6)]
    (output,) = detector(80)([picture(160, 240, *squares)])
    found = zip(output["boxes"].tolist(), output["classes"].tolist(), strict=True)
    expected = [([x, y, x + side, y + side], colour) for x, y, side, colour in squares]
    assert sorted(found) == sorted(expected)
    assert output["scores"].tolist() == sorted(output["scores"].tolist(), reverse=True)


def test_an_object_larger_than_the_overlap_is_seen_whole():
    large = picture(160, 240, (20, 20, 130, 7))
    (output,) = detector(80)([large])
    assert output["boxes"].tolist() == [[20, 20, 150, 150]]
    (output,) = detector(80, whole_image=False)([large])
    assert len(output["boxes"]) > 1


def test_the_whole_image_says_nothing_about_what_a_tile_can_hold():
    class Wide(Squares):
        def detect(self, sample):
            found = super().detect(sample)
            whole = sample["width"] > 80
            return {**found, "boxes": found["boxes"] + (6.0 if whole else 0.0)}

    tiled = TiledDetector(Wide(), Tiling(80, 0.25), UNCHANGED, 100).eval()
    (output,) = tiled([picture(80, 240, (50, 40, 16, 3))])
    assert output["boxes"].tolist() == [[50, 40, 66, 56]]


def test_a_cut_box_without_a_whole_one_stays():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 30, 10], [0, 0, 30, 10], [60, 0, 70, 10]])
    classes = torch.tensor([1, 1, 2, 2])
    cut = torch.tensor([True, False, True, True])
    found = Found(boxes, torch.ones(4), classes, cut)
    assert covered_pieces(found).tolist() == [True, False, False, False]
    phantom = found._replace(scores=torch.tensor([0.9, 0.2, 0.9, 0.9]))
    assert not covered_pieces(phantom).any()
    nothing = Found(*(column[:0] for column in found))
    assert covered_pieces(nothing).tolist() == []


def test_a_huge_image_is_compared_a_few_boxes_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    corner, side = torch.rand(2, 300, 2, generator=generator) * 50
    found = Found(
        torch.cat([corner, corner + side], dim=1),
        torch.rand(300, generator=generator),
        torch.randint(2, (300,), generator=generator),
        torch.rand(300, generator=generator) < 0.5,
    )
    expected = covered_pieces(found)
    assert 0 < expected.sum() < found.cut.sum()
    compared = []
    shares = module._shares_within
    monkeypatch.setattr(
        module, "_shares_within", lambda a, b: compared.append(len(a) * len(b)) or shares(a, b)
    )
    monkeypatch.setattr(module, "_MOST_PAIRS", 1000)
    assert covered_pieces(found).equal(expected)
    assert max(compared) <= 1000


def test_tiles_run_in_batches_of_four_whatever_the_image():
    tiled = detector(64, 0.0)
    tiled([picture(64 * 5, 64 * 3)])
    assert [len(batch) for batch in tiled.model.batches] == [4, 4, 4, 3, 1]
    assert set(itertools.chain(*tiled.model.batches[:-1])) == {(64, 64)}


def test_a_tile_is_resized_as_an_image_of_its_size():
    resizing = ResizeAndFlip((128,), "choice", 240, False)
    tiled = detector(64, 0.0, resizing=resizing)
    (output,) = tiled([picture(64, 320, (70, 10, 8, 9))])
    assert tiled.model.batches == [[(128, 128)] * 4, [(128, 128)], [(48, 240)]]
    assert (output["boxes"] - torch.tensor([70.0, 10, 78, 18])).abs().max() < 1


def test_no_more_boxes_than_an_image_may_have():
    squares = [(20 * number, 10, 8, number + 1) for number in range(12)]
    (output,) = detector(80, max_dets=5)([picture(60, 240, *squares)])
    assert len(output["scores"]) == 5


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes_dataset(tmp_path_factory.mktemp("shapes"), 1, 6, image_size=(64, 128))


@pytest.fixture
def cfg(shapes, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    small = ("INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96")
    small += ("MODEL.FCOS.INFERENCE_TH_TEST", "0.0")  # random weights are never sure
    return load_cfg("d2scale://MetaFCOS/small-cpu.yaml", [*small, "OUTPUT_DIR", str(tmp_path)])


def results_of(cfg, model, tile):
    cfg.D2SCALE.TILES.SIZE = tile
    evaluate_datasets(cfg, model)
    return (Path(cfg.OUTPUT_DIR) / "inference" / "coco_instances_results.json").read_bytes()


def test_images_no_larger_than_a_tile_give_the_same_bits(cfg):
    torch.manual_seed(0)
    model = new_model(cfg)
    untiled = results_of(cfg, model, 0)
    assert results_of(cfg, model, 128) == untiled
    assert results_of(cfg, model, 64) != untiled
    assert model.training


class Recorder(nn.Module):
    """Notes the image id and pixels of every sample; detects nothing."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, samples):
        self.seen += [(sample["image_id"], sample["image"].numpy()) for sample in samples]
        return [Squares().detect(picture(32, 32)) for _ in samples]


def test_an_evaluation_sees_the_pixels_of_a_file_in_the_models_order(cfg, caplog):
    caplog.set_level(logging.INFO)
    records = load_dataset(cfg.DATASETS.TEST[0]).records
    files = {r.image_id: np.asarray(Image.open(r.file_name)) for r in records}
    cfg.INPUT.MIN_SIZE_TEST, cfg.D2SCALE.TILES.SIZE = 64, 64
    evaluate_datasets(cfg, model := Recorder())
    assert "images larger than 64 pixels are seen in tiles" in caplog.text
    for image_id, pixels in files.items():
        views = [view for seen, view in model.seen if seen == image_id]
        corner = pixels[:64, :64, ::-1].transpose(2, 0, 1)  # BGR
        assert np.array_equal(views[0], corner)
        assert len(views) == 1 + len(Tiling(64).tiles(*pixels.shape[:2]))


@pytest.mark.parametrize(
    ("key", "value"),
    [("SIZE", "-1"), ("SIZE", "8"), ("SIZE", "many"), ("OVERLAP", "1.0"), ("OVERLAP", "-0.1")],
)
def test_a_wrong_tile_is_one_line(cfg, tmp_path, capsys, key, value):
    option = {"SIZE": "--tile", "OVERLAP": "--overlap"}[key]
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": new_model(cfg).state_dict()}, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    out = tmp_path / "out"
    assert main(["visualize", str(tmp_path), "-o", str(out), f"{option}={value}"]) == 2
    settings = ["OUTPUT_DIR", str(tmp_path / "run"), f"D2SCALE.TILES.{key}", value]
    config = ["--config-file", "d2scale://MetaFCOS/small-cpu.yaml"]
    assert main(["train", *config, *settings]) == 2
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if f"D2SCALE.TILES.{key} is" in line]
    assert len(told) == 2
    assert not out.exists()
    assert not (tmp_path / "run").exists()


def test_an_overlap_without_tiles_is_one_line(tmp_path, cfg, capsys):
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": new_model(cfg).state_dict()}, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    words = ["visualize", str(tmp_path), "-o", str(tmp_path / "out"), "--overlap", "0.3"]
    assert main(words) == 2
    assert "OVERLAP is 0.3; allowed: none without tiles; add --tile" in capsys.readouterr().err
    assert main([*words, "--tile", "64"]) == 0
