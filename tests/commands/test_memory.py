"""``d2scale memory``: which engine a recipe is for."""

import sys

import pytest

from d2scale import cli
from d2scale.commands.engines import choose_engine


@pytest.mark.parametrize(
    ("text", "engine"),
    [
        ("MODEL: {META_ARCHITECTURE: MetaOneStageDetector}\n", "default"),
        ("MODEL: {META_ARCHITECTURE: RetinaNet}\nD2SCALE: {LR_RULE: sqrt}\n", "detectron2"),
        ("MODEL: {MASK_ON: true}\n", "detectron2"),
        ("D2GO_DATA: {AUG_OPS: {TRAIN: []}}\n", "d2go"),
    ],
)
def test_the_engine_follows_the_keys_of_the_recipe(write_config, text, engine):
    assert choose_engine(write_config(text))[0] == engine


def test_a_lazy_config_is_detectron2s():
    assert choose_engine("x.py")[0] == "detectron2"


def test_without_detectron2_its_recipe_ends_with_what_to_install(write_config, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    for name in [name for name in sys.modules if name.startswith("d2scale.detectron2.")]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["memory", write_config("MODEL: {META_ARCHITECTURE: RetinaNet}\n")]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert "needs detectron2" in line
    assert "install page" in line


def test_a_recipe_of_d2go_is_sent_to_its_runner(write_config, capsys):
    assert cli.main(["memory", write_config("D2GO_DATA: {AUG_OPS: {TRAIN: []}}\n")]) == 2
    assert "--engine is 'd2go'" in capsys.readouterr().err
