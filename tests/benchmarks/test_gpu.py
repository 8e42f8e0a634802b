"""Every slice of the GPU campaign runs, shrunk to seconds on a CPU."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import gpu
import machine
import pytest
from campaign.checks import junit_rows
from campaign.memory import correction
from campaign.setting import Setting
from campaign.slices import SLICES
from campaign.trace import summary
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# One slice of each function: the others differ in a number. The report runs an experiment.
OF_EACH_FUNCTION = {getattr(one.run, "func", one.run): one for one in reversed(SLICES)}
FAST = [one for one in OF_EACH_FUNCTION.values() if one.name != "experiment-1"]


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("DETECTRON2_DATASETS", "")  # drawn shapes, and restored
    return tmp_path / "results"


@pytest.mark.filterwarnings("ignore")  # as in the campaign itself
@pytest.mark.parametrize("one", FAST, ids=lambda one: one.name)
def test_a_dry_slice_makes_rows_and_keeps_nothing(one, results):
    rows = gpu.dry_run(one)
    json.dumps(rows)
    keys = [row["key"] for row in rows]
    assert keys
    assert len(set(keys)) == len(keys)
    assert not results.exists()


def test_slices_are_short_and_of_one_name():
    names = [one.name for one in SLICES]
    assert len(set(names)) == len(names)
    for one in SLICES:
        assert one.minutes < gpu.LIMIT_MINUTES
        assert one.text
        keywords = getattr(one.run, "keywords", {})
        for path in keywords.get("paths", ()):
            assert (gpu.REPOSITORY / path).exists()
            if keywords.get("marked", True):
                text = (gpu.REPOSITORY / path).read_text()
                assert any(mark in text for mark in ("on_both_devices", "GPU", "mark.gpu")), path
    assert all(one.name in gpu.table() for one in SLICES)


def needs_of(names):
    """The packages that these need, and what those need, on Linux."""
    found, waiting = set(), list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        with contextlib.suppress(PackageNotFoundError):  # what torch needs on a GPU
            needs = [Requirement(text) for text in requires(name) or ()]
            here = {"extra": "", "python_version": "3.12"}
            waiting += [
                need.name for need in needs if not need.marker or need.marker.evaluate(here)
            ]
    return found


def test_wheels_are_all_that_torch_does_not_bring():
    own = [Requirement(text) for text in requires("d2scale")]
    wanted = [need.name for need in own if not need.marker or "train" in str(need.marker)]
    wanted += ["pytest", "pytest-timeout", "hypothesis"]
    lines = (gpu.REPOSITORY / "benchmarks" / "gpu-wheels.txt").read_text().splitlines()
    listed = {canonicalize_name(line) for line in lines if not line.startswith("#")}
    there = needs_of(["torch", "torchvision", "pip"])
    assert needs_of(wanted) - there - listed == {"fvcore", "iopath"}


def test_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    def rows(setting):
        yield {"key": "a", "value": 1}
        raise ZeroDivisionError("a fault of the program")

    slices = [
        gpu.Slice("good", 1.0, lambda setting: iter([{"key": "b"}])),
        gpu.Slice("bad", 1.0, rows),
        gpu.Slice("later", 1.0, rows),
    ]
    monkeypatch.setattr(gpu, "SLICES", slices)
    monkeypatch.setattr(Setting, "on_gpu", lambda folder, gib: Setting.dry_run(folder))
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    gpu.run_here(slices[0], None)
    with pytest.raises(ZeroDivisionError):
        gpu.run_here(slices[1], None)
    (kept,) = json.loads((machine.RESULTS / "gpu_bad.json").read_text())
    assert kept["value"] == 1
    assert kept["machine"]["packages"]["torch"]
    known = gpu.statuses()
    assert known["good"]["status"] == "done"
    assert known["bad"]["status"].startswith("failed: ZeroDivisionError")
    assert [one.name for one in gpu.open_slices([])] == ["later", "bad"]
    # Another GPU has everything before it.
    assert len(gpu.open_slices(["another"])) == 3
    assert gpu.run_all(slices, 0.5, None) == 0
    assert "good: not begun, for it takes 1 minutes" in capsys.readouterr().out


def test_a_part_of_the_card_keeps_rows_beside_those_of_all_of_it(monkeypatch, tmp_path):
    one = gpu.Slice("one", 1.0, lambda setting: iter([{"key": "a"}]))
    monkeypatch.setattr(gpu, "SLICES", [one])
    monkeypatch.setattr(Setting, "on_gpu", lambda folder, gib: Setting.dry_run(folder))
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    gpu.run_here(one, None)
    assert gpu.open_slices([], 16.0) == [one]
    gpu.run_here(one, 16.0)
    assert [row["key"] for row in machine.kept("gpu_one", "key")] == ["a", "a, 16 GiB"]
    assert gpu.open_slices([], 16.0) == gpu.open_slices([]) == []
    assert [line.split("|")[1].strip() for line in gpu.table().splitlines()[2:]] == [
        "one",
        "one, 16 GiB",
    ]


@pytest.mark.parametrize("text", ["[{", "[1]", '[{"slice": "doctor"}]', "7"])
def test_damaged_results_are_told_in_one_line(monkeypatch, results, capsys, text):
    results.mkdir()
    (results / "gpu.json").write_text(text)
    monkeypatch.setattr(gpu, "gpus_here", lambda: ["a GPU"])
    for arguments in (["--list"], ["--only", "doctor"]):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        assert gpu.main() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"gpu.py: error: results is '{results / 'gpu.json'}'")


def test_a_reader_that_leaves_ends_the_list_quietly(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--list"])
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert gpu.main() == 1
    assert capsys.readouterr().err == ""


_HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print("hanging")
open(__file__ + ".pid", "w").write(str(child.pid))
time.sleep(1000)
"""


def wait_for(condition):
    end = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def is_gone(pid):
    """Whether a process has ended; one that waits for its parent to notice is a zombie."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


@pytest.mark.parametrize(
    ("code", "end", "words"),
    [
        (_HANGS, "stopped after 5 s", ""),
        ("import sys; sys.exit('a mistake')", "failed", "a mistake"),
    ],
)
def test_a_slice_that_hangs_or_breaks_is_told(monkeypatch, tmp_path, capsys, code, end, words):
    script = tmp_path / "script.py"
    script.write_text(code)
    one = gpu.Slice("one", 0.01, lambda setting: iter(()))
    gpu._keep_status(one.name, "done", 7, time.monotonic())  # from an earlier time
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu, "LIMIT_MINUTES", 5 / 60)
    assert gpu.run_all([one], None, None) == 1
    told = capsys.readouterr().out
    assert end in told
    assert words in told
    assert "done" not in told
    if code == _HANGS:
        wait_for(lambda: is_gone(int((tmp_path / "script.py.pid").read_text())))


_CAMPAIGN = """
import sys
from pathlib import Path
import gpu, machine
gpu.gpus_here = lambda: ["a GPU"]
gpu.FOLDER = machine.RESULTS = Path(sys.argv.pop(1))
gpu.__file__ = sys.argv.pop(1)
sys.exit(gpu.main())
"""


def start_campaign(folder, code):
    script = folder / "script.py"
    script.write_text(code)
    command = [sys.executable, "-c", _CAMPAIGN, str(folder / "kept"), str(script)]
    path = str(gpu.REPOSITORY / "benchmarks")
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (signal.SIGINT, 130, "interrupted; the same command goes on\n"),
        (signal.SIGTERM, 143, ""),
    ],
)
def test_ending_the_campaign_ends_its_slice(tmp_path, number, status, words):
    campaign = start_campaign(tmp_path, _HANGS)
    pid = wait_for((tmp_path / "script.py.pid").exists) and wait_for(
        (tmp_path / "script.py.pid").read_text
    )
    campaign.send_signal(number)
    assert campaign.communicate(timeout=60)[1] == words
    assert campaign.returncode == status
    wait_for(lambda: is_gone(int(pid)))


def test_a_bare_machine_is_told_what_is_missing():
    script = gpu.REPOSITORY / "benchmarks" / "gpu.py"
    # Without site-packages.
    command = [sys.executable, "-S", str(script), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("torch is not installed; see ")
    assert len(done.stderr.splitlines()) == 1


def test_results_that_cannot_be_kept_are_told_before_anything_runs(tmp_path):
    (tmp_path / "kept").write_text("no folder")
    campaign = start_campaign(tmp_path, _HANGS)
    told = campaign.communicate(timeout=60)[1].splitlines()
    assert campaign.returncode == 2
    assert [line.partition(" is ")[0] for line in told] == ["results", "logs"]
    assert not (tmp_path / "script.py.pid").exists()


def test_reads_what_pytest_has_written():
    xml = """<testsuites><testsuite>
      <testcase classname="m" name="fits" time="1.5"><properties>
        <property name="relative error" value="1e-12"/></properties></testcase>
      <testcase classname="m" name="breaks" time="0"><failure message="assert 1 == 2">x</failure>
      </testcase>
      <testcase classname="m" name="waits" time="0"><skipped message="needs a device"/></testcase>
    </testsuite></testsuites>"""
    fits, breaks, _, count = junit_rows(xml, failures_only=False)
    assert fits == {"key": "m.fits", "outcome": "passed", "seconds": 1.5, "relative error": "1e-12"}
    assert breaks["reason"] == "assert 1 == 2"
    assert count == {"key": "all", "failed": 1, "skipped": 1, "passed": 1}
    assert [row["key"] for row in junit_rows(xml, failures_only=True)] == ["m.breaks", "all"]


def test_correction_is_a_constant_and_bytes_an_image():
    def row(images):
        predicted, beyond = 1.0 + images, 0.5 + 0.25 * images
        measured = predicted + beyond
        error = 100 * (predicted / measured - 1)
        return {"images": images, "reserved GiB": measured, "reserved error %": error}

    found = correction([row(1), row(4), row(9)])
    assert found == {"constant MiB": 512, "MiB an image": 256.0}


def test_a_trace_says_what_a_device_did():
    def event(kind, begin, length, name="k"):
        return {"ph": "X", "cat": kind, "ts": begin, "dur": length, "name": name}

    events = [
        event("kernel", 0.0, 400.0),
        event("kernel", 400.0, 100.0),
        event("kernel", 900.0, 100.0),
        event("gpu_memcpy", 300.0, 200.0),
        event("gpu_memcpy", 600.0, 100.0),
        event("cuda_runtime", 0.0, 50.0, "cudaStreamSynchronize"),
        event("cuda_runtime", 60.0, 10.0, "cudaMemcpyAsync"),
    ]
    found = summary(events, steps=1)
    assert found["ms a step"] == 1.0
    assert found["device busy %"] == 60.0
    assert found["gaps above 20 us"] == 1.0
    assert found["launches"] == 3.0
    assert found["of them beside kernels %"] == 66.7
    assert found["waits of the host"] == 1.0
