"""What can be known before ranks are started is told before d2go writes anything."""

import sys
from contextlib import suppress

import pytest

from d2go_commands import RETINANET
from own_data import OwnData, injection

NO_FILE = "/nowhere/model.pth"
RECIPE = (
    RETINANET.replace("coco_2017_train", "mine")
    .replace("coco_2017_val", "mine")
    .replace("NUM_CONVS: 1", "NUM_CONVS: 1, NUM_CLASSES: 6")
    .replace("DATASETS: {", "SOLVER: {REFERENCE_WORLD_SIZE: 2, IMS_PER_BATCH: 8}\nDATASETS: {")
)


@pytest.fixture
def faults_of(tmp_path, write_config, monkeypatch, capsys):
    """Check a config with these settings, in the process that starts the ranks."""
    from d2scale.d2go.runner import Runner

    path = write_config(RECIPE + injection(OwnData(tmp_path / "data")))

    def run(*settings, words=(), runner=Runner):
        cfg = runner.get_default_cfg()
        cfg.merge_from_file(path)
        cfg.merge_from_list(list(settings))
        monkeypatch.setattr(sys, "argv", ["d2go.train_net", *words])
        with suppress(SystemExit):
            runner.create_shared_context(cfg)
        return capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["MODEL.META_ARCHITECTURE", "RetinaNets"], "MODEL.META_ARCHITECTURE is 'RetinaNets'"),
        (["MODEL.BACKBONE.NAME", "resnet"], "MODEL.BACKBONE.NAME is 'resnet'"),
        (["MODEL.WEIGHTS", NO_FILE], f"MODEL.WEIGHTS is '{NO_FILE}'"),
        (["DATASETS.TRAIN", "('other',)"], "DATASETS.TRAIN is 'other'"),
        (["SOLVER.STEPS", "('x',)"], "SOLVER.STEPS is ('x',)"),
    ],
)
def test_what_is_not_there_is_one_line(faults_of, settings, expected):
    assert faults_of() == []
    (line,) = faults_of(*settings)
    assert line.startswith(f"d2scale: error: {expected}; allowed: ")


def test_weights_are_not_needed_to_resume(faults_of):
    assert faults_of("MODEL.WEIGHTS", NO_FILE, words=["--resume"]) == []


@pytest.mark.parametrize(
    "words",
    [["--num-processes", "3"], ["--num-processes=1", "--num-machines", "3"], ["--num-gpus", "3"]],
)
def test_an_uneven_split_is_refused_by_the_command_line(faults_of, words):
    (line,) = faults_of(words=words)
    assert "SOLVER.IMS_PER_BATCH is 8; allowed: a multiple of 3 processes" in line
    assert faults_of(words=[*words, "--eval-only"]) == []


def test_a_runner_of_ones_own_may_register_models_later(faults_of):
    from d2scale.d2go.runner import Runner

    class Mine(Runner):
        def register(self, cfg):
            super().register(cfg)

    assert faults_of("MODEL.META_ARCHITECTURE", "MyDetector", runner=Mine) == []
