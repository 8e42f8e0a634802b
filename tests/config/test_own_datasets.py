from __future__ import annotations

import re
from pathlib import Path

import pytest

from d2scale.config import get_cfg
from d2scale.config.own_datasets import (
    IM_DIRS,
    JSON_FILES,
    NAMES,
    OwnDataset,
    annotation_digests,
    file_digests,
    make_paths_absolute,
    own_datasets,
)
from d2scale.config.upstream import engine_of
from d2scale.errors import ConfigError, DataError
from d2scale.planning.progress import recipe_of

COLUMNS = {NAMES: ["mine", "other"], IM_DIRS: ["a", "/b"], JSON_FILES: ["a.json", "/b.json"]}


def make_cfg(**columns):
    cfg = get_cfg()
    node = cfg.D2GO_DATA.DATASETS.COCO_INJECTION
    node.NAMES, node.IM_DIRS, node.JSON_FILES = (list(values) for values in COLUMNS.values())
    node.update(columns)
    return cfg


def test_relative_paths_begin_at_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = {
        "mine": OwnDataset(tmp_path / "a.json", tmp_path / "a"),
        "other": OwnDataset(Path("/b.json"), Path("/b")),
    }
    assert own_datasets(make_cfg()) == own_datasets(COLUMNS) == expected
    cfg = make_cfg()
    make_paths_absolute(cfg)
    assert [str(tmp_path / "a"), "/b"] == cfg.D2GO_DATA.DATASETS.COCO_INJECTION.IM_DIRS
    monkeypatch.chdir("/")
    assert own_datasets(cfg) == expected
    assert own_datasets(get_cfg()) == own_datasets({}) == {}


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"IM_DIRS": ["a"]}, f"{IM_DIRS} is ['a']; allowed: 2 of them, as {NAMES} has names"),
        ({"JSON_FILES": []}, f"{JSON_FILES} is []; allowed: 2 of them"),
        ({"NAMES": ["mine", "mine"]}, "names that differ; mine: give each dataset a name"),
        ({"NAMES": "mine"}, f"{NAMES} is 'mine'; allowed: a list of names"),
        ({"IM_DIRS": ["a", 3]}, "allowed: a list of names"),
    ],
)
def test_lists_that_do_not_fit_together_are_a_line_each(columns, told):
    with pytest.raises(ConfigError) as raised:
        own_datasets(make_cfg(**columns))
    assert told in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_the_keys_do_not_choose_the_engine():
    retinanet = {"MODEL.META_ARCHITECTURE": "RetinaNet"}
    assert engine_of({**retinanet, **COLUMNS})[0] == "detectron2"
    assert engine_of({**retinanet, **COLUMNS, "D2GO_DATA.TEST.MAX_IMAGES": 3})[0] == "d2go"


def test_a_recipe_is_another_if_the_annotations_change_and_not_if_they_move(tmp_path):
    def recipe(name, content):
        path = tmp_path / name
        path.write_text(content)
        cfg = make_cfg(JSON_FILES=[str(path), "not there"])
        cfg.DATASETS.TRAIN = ("mine", "other")
        return recipe_of(cfg)

    first = recipe("one.json", "{}")
    assert list(annotation_digests(make_cfg())) == []
    assert len([key for key in first if key.startswith("annotations of ")]) == 1
    assert recipe("moved.json", "{}") == first
    tested = make_cfg(JSON_FILES=[str(tmp_path / "one.json"), "not there"])
    tested.DATASETS.TEST = ("mine",)
    assert annotation_digests(tested) == {}
    assert list(annotation_digests(tested, tested=True)) == ["annotations of mine (digest)"]
    assert recipe("one.json", "{} ") != first


def test_a_file_that_may_not_be_read_has_no_digest(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "a.json"
    path.write_text("{}")
    assert [*file_digests({"mine": path})] == ["annotations of mine (digest)"]
    path.write_text("{ }")
    monkeypatch.setattr(Path, "open", refuse)
    assert file_digests({"mine": path}) == {}


@pytest.mark.parametrize("name", ["../../elsewhere", "a/b", "..", ".", "a\nb", "a\0b"])
def test_a_name_that_is_no_name_of_a_folder_is_refused(name):
    section = {NAMES: [name], IM_DIRS: ["images"], JSON_FILES: ["a.json"]}
    with pytest.raises(DataError, match="rename the dataset"):
        own_datasets(section)


@pytest.mark.parametrize("key", [IM_DIRS, JSON_FILES])
@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_a_path_that_no_system_has_is_refused(key, path):
    section = {NAMES: ["mine"], IM_DIRS: ["images"], JSON_FILES: ["a.json"], key: [path]}
    with pytest.raises(DataError, match=rf"{re.escape(key)} is .*; allowed: paths without null"):
        own_datasets(section)
