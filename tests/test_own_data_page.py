"""docs/your_own_data.md: what can be tried of it without training, as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from d2scale.cli import main
from d2scale.coco.shapes import write_shapes_dataset

PAGE = (Path(__file__).resolve().parents[1] / "docs/your_own_data.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^\$ d2scale (.*)$", PAGE, re.MULTILINE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "write('drawn', 240, 48, only_drawn=True)" in PAGE
    write_shapes_dataset("drawn", 12, 4, only_drawn=True)
    for name, text in zip(("mine.yaml", "retinanet.yaml"), RECIPES, strict=True):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_commands_before_training(folder, capsys):
    quick = [words for words in map(shlex.split, COMMANDS) if words[0] in ("data", "plan")]
    assert len(quick) == 3
    outputs = []
    for words in quick:
        assert main(words) == 0, words
        outputs.append(capsys.readouterr().out)
    assert (folder / "sheet.jpg").is_file()
    assert "optimizer steps:       300" in outputs[2]
    # The lines that the command gives are those of the recipe.
    lines = yaml.safe_load(outputs[0].partition("lines for a config:\n")[2])
    given, recipe = (
        content["D2GO_DATA"]["DATASETS"]["COCO_INJECTION"]
        for content in (lines, yaml.safe_load(RECIPES[0]))
    )
    assert given == {key: values[:1] for key, values in recipe.items()}


def test_both_recipes_name_the_same_datasets():
    mine, retinanet = map(yaml.safe_load, RECIPES)
    assert mine["D2GO_DATA"] == retinanet["D2GO_DATA"]
    assert mine["DATASETS"] == retinanet["DATASETS"]
    assert retinanet["MODEL"]["RETINANET"]["NUM_CLASSES"] == 6
