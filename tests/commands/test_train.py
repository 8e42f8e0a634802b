import os
import sys

import pytest

from d2scale.cli import main

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
