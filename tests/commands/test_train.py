import os
import sys

import pytest

from d2scale.cli import main
from d2scale.commands import train
from d2scale.commands.engines import choose_engine

WAITING = "OMP_WAIT_POLICY"
RECIPE = "d2scale://MetaFCOS/small-cpu.yaml"


@pytest.fixture
def waiting_of_the_training(monkeypatch):
    """Run ``d2scale train`` up to the training, and tell how its threads would wait."""
    seen = []
    monkeypatch.setattr(
        "d2scale.engine.run.train",
        lambda cfg, *arguments, **options: seen.append(os.environ.get(WAITING)),
    )

    def run(*options):
        # Whatever the command sets is gone after the test.
        monkeypatch.setenv(WAITING, os.environ.get(WAITING, ""))
        if not os.environ[WAITING]:
            del os.environ[WAITING]
        assert main(["train", "--config-file", RECIPE, *options]) == 0
        return seen.pop()

    return run


def test_threads_of_a_cpu_wait_without_spinning(waiting_of_the_training, monkeypatch):
    monkeypatch.delenv(WAITING, raising=False)
    assert waiting_of_the_training() == "PASSIVE"


def test_a_user_and_a_gpu_keep_their_way_of_waiting(waiting_of_the_training, monkeypatch):
    monkeypatch.delenv(WAITING, raising=False)
    assert waiting_of_the_training("MODEL.DEVICE", "cuda") is None
    monkeypatch.setenv(WAITING, "ACTIVE")
    assert waiting_of_the_training() == "ACTIVE"


def test_without_d2go_its_engine_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_ENV_MODULE", "")
    monkeypatch.setitem(sys.modules, "detectron2", None)
    assert main(["train", "--engine", "d2go", "--config-file", RECIPE, "--output-dir", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--engine d2go needs detectron2, which is not installed; install d2go" in line


def test_only_d2go_takes_options_that_are_not_d2scales(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config-file", RECIPE, "--output-dir", "out"])
    assert "unrecognized arguments: --output-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "engine", "reason"),
    [
        ("MODEL: {META_ARCHITECTURE: MetaOneStageDetector}", "default", "an installed project"),
        ("MODEL: {META_ARCHITECTURE: RetinaNet}", "detectron2", "is RetinaNet"),
        ("SOLVER: {BASE_LR: 0.02}\nD2SCALE: {IMS_PER_GPU: 1}", "detectron2", "GeneralizedRCNN"),
        ("MODEL_EMA: {ENABLED: true}", "d2go", "MODEL_EMA.ENABLED is no key of detectron2"),
    ],
)
def test_a_recipe_chooses_its_engine(write_config, monkeypatch, capsys, recipe, engine, reason):
    chosen = []
    for name in ("default", "detectron2", "d2go"):
        monkeypatch.setitem(train._ENGINES, name, lambda arguments, name=name: chosen.append(name))
    assert main(["train", "--config-file", str(write_config(recipe))]) == 0
    assert chosen == [engine]
    line = capsys.readouterr().err
    assert line.startswith(f"d2scale: engine {engine}: ")
    assert reason in line
    assert main(["train", "--config-file", str(write_config(recipe)), "--engine", "d2go"]) == 0
    assert chosen[1:] == ["d2go"]


def test_python_files_are_lazy_configs_and_not_run_to_choose(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text("raise SystemExit('was run')")
    assert choose_engine(str(path)) == ("detectron2", "the recipe is a LazyConfig")


def test_without_detectron2_a_line_says_what_to_install(write_config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    monkeypatch.delitem(sys.modules, "d2scale.detectron2.run", raising=False)
    recipe = write_config("MODEL: {META_ARCHITECTURE: RetinaNet}")
    assert main(["train", "--config-file", str(recipe)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "needs detectron2, which is not installed; build detectron2" in error
