import base64
import json
import os
import re

import pytest

from d2scale.errors import DataError
from d2scale.report import write_report
from d2scale.report.runs import read_run
from d2scale.report.write import _about_curves, read_runs
from run_folders import GAIN_CONFIG, detections, step_lines


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    monkeypatch.setattr("d2scale.report.curves._DOTS_PER_INCH", 30)


def few_lines(**others):
    """Return lines with two curves only: pictures take time."""
    names = ("iteration", "images_seen", "elapsed_seconds", "total_loss", "lr")
    return [{**{name: line[name] for name in names}, **others} for line in step_lines(6)]


@pytest.fixture
def two_runs(make_run, shapes):
    config = {"SOLVER": {"IMS_PER_BATCH": 16, "MAX_ITER": 10}}
    return [
        make_run("first", lines=few_lines(), found=detections(shapes, shift=1.0)),
        make_run(
            "second",
            lines=[{**line, "elapsed_seconds": 0.3 * line["iteration"]} for line in few_lines()],
            found=detections(shapes, shift=9.0),
            config=config,
        ),
    ]


def test_a_whole_report(two_runs, tmp_path):
    output = tmp_path / "out" / "report.html"
    files = write_report(two_runs, output, published=True)
    html = files.html.read_text()
    for title in ("Results", "Curves", "Throughput", "Settings", "Examples"):
        assert f"<h2>{title}" in html
    assert "more than the noise of the images); 50% less time than first." in html
    assert "published numbers are shown for reference only" in html
    assert not re.search(r"(src|srcset)=\"(?!data:)", html)
    # Two curves against three axes, twice; four examples of three; the page has them all.
    embedded = re.findall(r"base64,([A-Za-z0-9+/=]+)", html)
    assert len(embedded) == 2 * 3 * 2 + 4 * 3
    assert len(files.pictures) == 2 * 3 + 4 * 3 + 2
    on_disk = {path.read_bytes() for path in files.pictures}
    assert len(on_disk & {base64.b64decode(each) for each in embedded}) == 2 * 3 + 4 * 3
    markdown = files.markdown.read_text()
    assert "second minus first" in markdown
    assert "](report_files/curves.png)" in markdown
    assert sorted(os.listdir(output.parent)) == ["report.html", "report.md", "report_files"]
    assert len(files.notes) == 2
    assert all("computed from its detections" in note for note in files.notes)


def test_the_curves_explain_the_noise_and_the_gain_rule_where_they_are_shown(make_run):
    plain = read_run(make_run("plain", lines=few_lines()), "plain")
    noisy = read_run(make_run("noisy", lines=few_lines(noise_scale=5.0)), "noisy")
    gain = read_run(make_run("gain", lines=few_lines(), config=GAIN_CONFIG), "gain")
    texts = ["\n".join(_about_curves([run])) for run in (plain, noisy, gain)]
    assert ["Noise scale: the images" in text for text in texts] == [False, True, False]
    assert ["against those" in text for text in texts] == [False, False, True]


def test_faults_of_a_run_are_noted_and_the_rest_is_reported(two_runs, make_run, tmp_path):
    first, second = two_runs
    with open(second / "metrics.json", "a") as file:
        file.write('{"iteration": 99, "total')
    empty = tmp_path / "empty"
    empty.mkdir()
    gone = make_run("gone", lines=few_lines())
    files = write_report([first, second, empty, gone, first], tmp_path / "report.html")
    text = "\n".join(files.notes)
    assert "second: metrics.json: line 4 cannot be read" in text
    assert f"{empty} is skipped" in text
    assert "gone: no noise" in text
    html = files.html.read_text()
    assert "line 4 cannot be read" in html
    assert html.count("line 4 cannot be read") == 1
    assert "gone: no results of an evaluation." in html


def test_runs_that_are_none_are_refused(tmp_path, make_run):
    with pytest.raises(DataError) as raised:
        write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report.html")
    assert len(raised.value.faults) == 2
    file = make_run() / "config.yaml"
    with pytest.raises(DataError, match="folder of a run"):
        write_report([file], tmp_path / "report.html")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"metrics\.json"):
        write_report([empty], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_names_are_as_short_as_uniqueness_allows(make_run):
    folders = [make_run(name) for name in ("a/run", "b/run", "c")]
    runs, _ = read_runs([*folders, folders[0] / ".." / "run"])
    assert [run.name for run in runs] == ["a/run", "b/run", runs[2].folder.parent.name + "/c"]
    assert [run.name for run in read_runs(folders[:1])[0]] == ["run"]


def test_names_and_settings_cannot_break_the_page(make_run, tmp_path):
    nasty = "<img src=x onerror=alert(1)>"
    folder = make_run(
        nasty,
        results={"AP": 1.0, f"AP-{nasty}": 1.0},
        lines=few_lines(**{f"loss{nasty}": 1.0}),
        config={"MODEL": {"WEIGHTS": nasty}, "DATASETS": {"TEST": [nasty], "TRAIN": {nasty: 1}}},
        plan={"method": nasty, "ims_per_gpu": [nasty], "predicted_peak_gib": nasty},
        machine={"description": nasty, "device_memory_mb": nasty},
    )
    files = write_report([folder], tmp_path / "report.html")
    html = files.html.read_text()
    assert nasty not in html
    assert html.count("&lt;img src=x") > 5
    assert all(path.parent == tmp_path / "report_files" for path in files.pictures)
    assert nasty not in files.markdown.read_text()


@pytest.mark.parametrize(
    "values",
    [
        {"total_loss": "high", "time": None},
        {"total_loss": 1e300, "time": -1.0},
        {"images_seen": None, "elapsed_seconds": "late"},
        {"lr": True},
        {"steps": None, "recipe_steps": "many", "gain": -1.0, "noise_scale": -1e300},
        {"steps": -3, "recipe_steps": 1e300, "gain": 1e300, "noise_scale": 1e300},
    ],
)
def test_strange_values_end_in_a_report_too(make_run, tmp_path, values):
    folders = [
        make_run("one", lines=few_lines(**values)),
        make_run("gain", lines=few_lines(**values), config=GAIN_CONFIG),
    ]
    assert write_report(folders, tmp_path / "report.html").html.exists()


def test_strange_settings_end_in_a_report_too(make_run, tmp_path):
    config = {
        "SOLVER": {"IMS_PER_BATCH": "many", "MAX_ITER": -1, "STEPS": None, "BASE_LR": [1]},
        "DATASETS": {"TEST": {"a": "b"}, "TRAIN": 3},
    }
    folder = make_run(config=config, lines=few_lines(), plan={"world_size": "two"})
    assert write_report([folder], tmp_path / "report.html").html.exists()
    (folder / "plan.json").write_text(json.dumps([]))
    assert write_report([folder], tmp_path / "report.html", published=True).html.exists()
