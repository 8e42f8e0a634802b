from __future__ import annotations

import pytest

from d2scale.engine.checkpoint.weights import find_weights
from d2scale.errors import CheckpointError

NAME = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


@pytest.fixture(autouse=True)
def _no_real_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("D2SCALE_WEIGHTS", raising=False)


def put(path):
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    return path


def test_a_path(tmp_path):
    path = put(tmp_path / "a" / "model.pth")
    assert find_weights(str(path)) == path


def test_zoo_file_in_the_download_cache(tmp_path):
    path = put(tmp_path / "cache" / "detectron2" / "ImageNetPretrained" / "MSRA" / "R-50.pkl")
    assert find_weights(NAME) == path


def test_zoo_file_in_a_folder_of_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("D2SCALE_WEIGHTS", str(tmp_path / "zoo"))
    path = put(tmp_path / "zoo" / "ImageNetPretrained" / "MSRA" / "R-50.pkl")
    assert find_weights(NAME) == path


def test_address_in_the_cache(tmp_path):
    path = put(tmp_path / "cache" / "sub" / "model.pth")
    assert find_weights("https://example.com/sub/model.pth") == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.pth", "a file"),
        (NAME, "download https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50"),
        (NAME, "cache/detectron2/ImageNetPretrained/MSRA/R-50.pkl"),
        ("s3://bucket/model.pth", "an https address"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(name, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        find_weights(name)
    assert "\n" not in str(caught.value)
