"""The three experiments, tiny, on drawn shapes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2scale.cli import main
from d2scale.coco.catalog import ROOT_VARIABLE
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.errors import ConfigError, D2ScaleError
from d2scale.report import ReportFiles
from meta_fcos.reproduction import process, reproduction
from meta_fcos.reproduction.planned_experiment import is_finished
from meta_fcos.reproduction.prepare import ReproductionOptions
from meta_fcos.reproduction.reproduction import reproduce

IMAGES = 48
REPORT = ReportFiles(Path("report.html"), Path("report.md"), ())
SAME_BATCH = "experiment-2-same-batch"


@pytest.fixture(autouse=True)
def _one_thread_and_no_coco(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "nowhere"))


def options_for(folder, **changes):
    options = ReproductionOptions(str(folder), form="small", images_seen=IMAGES, images=(24, 2))
    return replace(options, **changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with all three experiments, and what was shown."""
    folder = tmp_path_factory.mktemp("reproduction")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv(ROOT_VARIABLE, str(folder / "nowhere"))
        shown = "\n".join(reproduce(options_for(folder / "out")))
    return folder / "out", shown


def rows(table):
    return {
        cells[0]: cells[1:]
        for line in table.splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")]) and len(cells) == 4
    }


def test_all_three_are_planned_trained_and_compared(undisturbed):
    folder, shown = undisturbed
    before, after = shown.split("side by side")
    planned, found = rows(before), rows(after)
    assert planned["runs on"] == ["2 processes", "1 process", "2 processes"]
    assert planned["standing"] == ["from the start"] * 3
    assert found["total batch"] == ["8", "8", "16"]
    assert found["images seen"] == ["48", "48", "48"]
    first, second, _ = (float(cell.split()[0]) for cell in found["final total_loss"])
    assert first == pytest.approx(second, rel=1e-4)
    assert "final loss of 2 same batch against 1 baseline" in after
    assert {"AP", "AP50", "ARl"} <= set(found)
    assert after.rstrip().endswith(f"Report: {folder / 'report.html'}")
    assert (folder / "report.html").exists()
    assert "experiment-3-large-batch" in (folder / "report.md").read_text()


def test_what_is_finished_is_not_run_again(undisturbed, monkeypatch):
    folder, _ = undisturbed
    monkeypatch.setattr(process.subprocess, "Popen", None)
    (folder / "report.html").unlink()
    shown = "\n".join(reproduce(options_for(folder)))
    assert rows(shown)["standing"] == ["finished"] * 3
    assert (folder / "report.html").exists()


def test_the_gain_rule_runs_beside_them(undisturbed, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(undisturbed[0], folder)
    shown = "\n".join(reproduce(options_for(folder, only="gain")))
    before, after = shown.split("side by side")
    assert "--method max_memory" in before
    lines = {line.split("|")[1].strip(): line for line in after.splitlines() if "|" in line}
    least, most, steps = 48 // 16, 48 // 8, float(lines["optimizer steps"].split("|")[4])
    assert least <= steps <= most
    assert float(lines["images seen"].split("|")[4]) == 16 * steps
    *_, published, gain = after.split("Report")[0].strip().splitlines()
    assert published.startswith("large batch by the linear rule, as published: AP ")
    assert published.endswith("after 3 steps of 16 images")
    assert gain.startswith("large batch by the gain rule: AP ")
    assert gain.endswith(f"after {steps:.0f} steps of 16 images")
    assert "final loss of 3 large batch by gain against 1 baseline" in after
    assert "by the gain rule" in (folder / "report.md").read_text()


def test_other_settings_in_the_same_folder_are_refused_by_name(undisturbed):
    folder, _ = undisturbed
    with pytest.raises(ConfigError) as raised:
        list(reproduce(options_for(folder, images_seen=96)))
    assert str(raised.value).startswith("--images-seen is 96; allowed: 48")
    assert len(str(raised.value).splitlines()) == 1


SCRIPT = """
import sys
from meta_fcos.reproduction.reproduction import reproduce
from meta_fcos.reproduction.prepare import ReproductionOptions
options = ReproductionOptions(sys.argv[1], form="small", images_seen=48, only="2", images=(24, 2))
for part in reproduce(options):
    print(part, flush=True)
"""


def wait_for(path, process, seconds=120.0):
    """Wait until ``process`` has written ``path``."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_killed_in_the_middle_and_called_again_it_ends_the_same(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduction, "write_report", lambda folders, output, published: REPORT)
    whole, _ = undisturbed
    folder = tmp_path / "out"
    run = folder / SAME_BATCH
    script = [sys.executable, "-c", SCRIPT, str(folder)]
    killed = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(run / "last_checkpoint", killed)
    killed.send_signal(signal.SIGKILL)
    # Its training holds the pipe until it ends too.
    killed.communicate(timeout=120)
    assert not is_finished(run)
    shown = "\n".join(reproduce(options_for(folder, only="2")))
    assert "goes on from model_" in shown
    ends = [
        torch.load(each / "model_final.pth", weights_only=True)
        for each in (run, whole / SAME_BATCH)
    ]
    assert ends[0]["images_seen"] == ends[1]["images_seen"]
    for name, weights in ends[1]["model"].items():
        assert torch.equal(ends[0]["model"][name], weights), name
    steps = [
        (each / "metrics.json").read_text().count("total_loss")
        for each in (run, whole / SAME_BATCH)
    ]
    assert steps[0] == steps[1]


def test_ctrl_c_waits_for_the_training_to_end(tmp_path):
    folder = tmp_path / "out"
    script = [sys.executable, "-m", "d2scale", "reproduce", "--form", "small"]
    options = ["--only", "2", "--images-seen", "800", "--output-dir", str(folder)]
    write_shapes_dataset(tmp_path / "real", 24, 2)
    environment = {**os.environ, ROOT_VARIABLE: str(tmp_path / "real")}
    started = subprocess.Popen(
        [*script, *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a shell ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(folder / SAME_BATCH / "metrics.json", started)
    started.send_signal(signal.SIGINT)
    _, told = started.communicate(timeout=120)
    assert started.returncode == 130
    assert "The same command goes on where this one stopped." in told
    assert "Traceback" not in told


def test_a_training_that_fails_is_told_with_its_experiment(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    write_shapes_dataset(tmp_path / "real", 24, 2)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "real"))
    parts = reproduce(options_for(folder, only="2"))
    next(parts)
    next(parts)
    image = next((tmp_path / "real" / "coco" / "train2017").iterdir())
    image.write_bytes(b"no picture")
    with pytest.raises(D2ScaleError, match="experiment 2 same batch: the training stopped"):
        list(parts)


def test_all_mistakes_are_told_at_once_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("D2SCALE_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    out = tmp_path / "out"
    options = ["--form", "full", "--images-seen", "0", "--num-gpus", "4096", "--output-dir"]
    assert main(["reproduce", *options, str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("d2scale: error: ") for line in lines)
    told = "\n".join(lines)
    for each in ("--images-seen is 0", "--num-gpus is 4096", "train2017.zip", "R-50.pkl"):
        assert each in told
    assert not out.exists()


@pytest.mark.parametrize("only", ["4", "1,x", "", "0"])
def test_an_experiment_that_does_not_exist_is_refused(only, tmp_path, capsys):
    arguments = ["reproduce", "--form", "small", "--only", only]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("d2scale: error: --only is ")


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["reproduce", "--form", "small", "--output-dir", str(tmp_path)]) == 2
    assert "--output-dir" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_plan_alone_writes_nothing(tmp_path, capsys):
    arguments = ["reproduce", "--form", "small", "--plan-only", "--num-gpus", "1"]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert rows(shown)["a step on each"] == ["2 x 4 images", "1 x 8 images", "2 x 8 images"]
    assert "the same training, to rounding" in shown
    assert not (tmp_path / "out").exists()
