"""The pictures of the tiled-inference benchmark are what it says they are."""

from __future__ import annotations

import numpy as np
import pytest
import tiled_inference
import torch
from PIL import Image

from d2scale.coco.dataset import load_dataset
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.models import new_model


def test_every_way_is_measured_on_pictures_with_boxes_in_their_place(
    tmp_path, monkeypatch, one_thread
):
    monkeypatch.setattr(tiled_inference, "TEST_SET", "large_pictures_of_a_test")
    monkeypatch.setattr(tiled_inference, "TRAINING_SET", "small_pictures_of_a_test")
    monkeypatch.setattr(tiled_inference, "FILLED", 1.0)
    write_shapes_dataset(tmp_path, 4, 8, image_size=(48, tiled_inference.CELL))
    tiled_inference.compose(tmp_path, 2, 2)
    record = load_dataset("large_pictures_of_a_test").records[0]
    assert (record.height, record.width) == (640, 640)
    picture = np.asarray(Image.open(record.file_name)).astype(int)
    assert len(record.boxes) > 50
    for x0, y0, x1, y1 in record.boxes:
        # A shape has an outline and a colour, the ground is grey.
        inside = picture[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1].reshape(-1, 3)
        assert np.ptp(inside, axis=1).max() > 60 or np.ptp(inside) > 100
    sides = (record.boxes[:, 2:] - record.boxes[:, :2]).max(axis=1)
    assert (sides < 40).sum() > 30
    assert (sides > 60).any()
    cfg = load_cfg("d2scale://MetaFCOS/small-cpu.yaml")
    weights = tmp_path / "model_final.pth"
    torch.save({"model": new_model(cfg).state_dict()}, weights)
    for way in (tiled_inference.WAYS[0], tiled_inference.WAYS[2]):
        row = tiled_inference.measure(way, weights, tmp_path, tmp_path / "drawn")
        assert set(tiled_inference.METRICS) <= row.keys()
        assert row["peak MB"] > 0
        assert (tmp_path / "drawn" / f"{way.name}.jpg").is_file()


def test_the_small_pictures_are_as_large_as_a_tile(tmp_path, monkeypatch):
    monkeypatch.setattr(tiled_inference, "TEST_SET", "large_pictures_of_another_test")
    monkeypatch.setattr(tiled_inference, "TRAINING_SET", "small_pictures_of_another_test")
    write_shapes_dataset(tmp_path, 4, 4, image_size=(48, tiled_inference.CELL))
    tiled_inference.compose(tmp_path, 1, 4)
    records = load_dataset("small_pictures_of_another_test").records
    assert set(records.widths) == set(records.heights) == {tiled_inference.TILE}
    assert len(records.boxes) == pytest.approx(10, abs=9)
