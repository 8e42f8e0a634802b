"""A project other than the shipped one brings its parts by entry points alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import d2scale as d2scale_package
from d2scale.coco.shapes import write_shapes_dataset

SOURCE = Path(__file__).parent / "support" / "tiny_project"
RECIPE = "d2scale://Tiny/tiny.yaml"
ENTRY_POINTS = """
[d2scale.configs]
tiny = tiny_project.config:add_tiny_config
[d2scale.models]
TinyDetector = tiny_project.model:build_tiny_detector
[d2scale.recipes]
Tiny = tiny_project.recipes
[d2scale.memory_profiles]
tiny = tiny_project.memory_profiles
[d2scale.commands]
tiny = tiny_project.command
"""


@pytest.fixture
def d2scale(tmp_path):
    """Run the command line where the project is installed; return what it prints."""
    shutil.copytree(SOURCE, tmp_path / "site" / "tiny_project")
    installed = tmp_path / "site" / "tiny_project-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-project\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(ENTRY_POINTS)
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "site"),
        "DETECTRON2_DATASETS": str(tmp_path / "shapes"),
    }

    def run(*arguments):
        command = [sys.executable, "-m", "d2scale", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_its_command_config_keys_and_recipe_are_known(d2scale):
    assert "show the channels of a tiny recipe" in d2scale("--help")
    assert d2scale("tiny", RECIPE) == "2\n"
    assert d2scale("tiny", RECIPE, "MODEL.TINY.CHANNELS", "3") == "3\n"


def test_its_memory_profile_fills_a_gpu(d2scale):
    options = ("--method", "max_memory", "--gpu-memory-gib", "1", "--format", "json")
    plan = json.loads(d2scale("plan", RECIPE, *options))
    assert plan["ims_per_gpu"] == 9


def test_its_model_trains(d2scale, tmp_path):
    write_shapes_dataset(tmp_path / "shapes", 4, 1, image_size=(32, 48))
    d2scale("train", "--config-file", RECIPE, "OUTPUT_DIR", str(tmp_path / "run"))
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["iteration"] == 1
    assert last["loss_tiny"] > 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "tiny_project.model INFO: a tiny detector of 2 channels" in log


def test_d2scale_names_no_project_but_in_examples():
    package = Path(d2scale_package.__file__).parent
    naming = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in sorted(package.rglob("*.*"))
        if path.suffix in (".py", ".css", ".html", ".md")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "fcos" in re.sub(r"d2scale://\S+", "", line).lower()
        and path.name != "dense_detectors.py"  # detectron2 has an FCOS too
    ]
    assert naming == []
