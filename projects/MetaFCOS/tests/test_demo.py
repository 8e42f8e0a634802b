from dataclasses import replace

import pytest

from d2scale.cli import main
from d2scale.coco.catalog import ROOT_VARIABLE
from d2scale.run_folder.lock import run_lock
from meta_fcos import demo
from meta_fcos.reproduction.experiments import EXPERIMENTS, chosen

OPTIONS = demo.OPTIONS


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """The demo on one process, a few images and steps."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "nowhere"))
    options = replace(demo.OPTIONS, images_seen=17, only="2", images=(24, 2))
    monkeypatch.setattr(demo, "OPTIONS", options)


def test_the_demo_shows_the_gain_rule_beside_what_was_published():
    assert chosen(OPTIONS.only) == EXPERIMENTS


def test_the_demo_plans_trains_and_ends_with_the_report(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(["demo", "--output-dir", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "| SOLVER.MAX_ITER                                 | 90000        | 5760000" in printed
    report = folder / "runs" / "report.html"
    assert printed.splitlines()[-1] == f"Report: {report}"
    assert report.exists()
    # Begun again, it runs anew.
    assert (folder / "runs" / "experiment-2-same-batch" / "model_final.pth").exists()
    demo._remove_runs(folder / "runs")
    assert not (folder / "runs").exists()


def test_a_demo_that_is_running_is_left_alone(tmp_path, capsys):
    folder = tmp_path / "demo"
    first = demo.run_demo(str(folder))
    next(first)
    model = folder / "runs" / "experiment-2-same-batch" / "model_final.pth"
    model.parent.mkdir(parents=True)
    model.touch()
    assert main(["demo", "--output-dir", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("d2scale: error: --output-dir is ")
    assert "no other run is writing to" in line
    first.close()
    # Its training may outlive it for a moment.
    with run_lock(model.parent):
        assert main(["demo", "--output-dir", str(folder)]) == 2
    assert model.exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo", "--output-dir", str(tmp_path)]) == 2
    assert "--output-dir" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
