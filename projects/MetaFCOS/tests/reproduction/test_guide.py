"""The guide names what there is, and its commands parse."""

import json
import re
import shlex
from pathlib import Path

import pytest

from d2scale import cli
from d2scale.config.loading import resolve_config_path, shipped_configs

PROJECT = Path(__file__).resolve().parents[2]
GUIDE = (PROJECT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^d2scale .*$", GUIDE, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_guide_can_be_typed(command):
    arguments = cli._parse(shlex.split(command, comments=True)[1:])
    if hasattr(arguments, "config_file"):
        assert Path(resolve_config_path(arguments.config_file)).is_file()


def test_every_recipe_is_listed():
    names = [name for name in shipped_configs() if name.startswith("MetaFCOS/")]
    recipes = {Path(name).stem for name in names} - {"Base-MetaFCOS"}
    assert recipes <= set(re.findall(r"^\| `([\w-]+)` \|", GUIDE, flags=re.MULTILINE))


def test_the_table_is_the_published_data():
    content = json.loads((PROJECT / "published" / "two-rtx-5000.json").read_text())
    rows = {
        cells[0]: cells[1:]
        for line in GUIDE.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 4
    }
    for column, run in enumerate(content["runs"]):
        assert rows["MAX_ITER"][column] == str(run["settings"]["SOLVER.MAX_ITER"])
        for metric in ("AP", "AP50", "AP75"):
            assert float(rows[metric][column]) == run["results"][metric]
