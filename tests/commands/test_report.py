"""The command itself; what it reports is tested in tests/report."""

import json

import pytest

from d2scale.cli import main


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    line = {"iteration": 0, "images_seen": 4, "elapsed_seconds": 1, "lr": 0.1}
    (folder / "metrics.json").write_text(json.dumps(line) + "\n{half")
    (folder / "config.yaml").write_text("SOLVER: {IMS_PER_BATCH: 4}\n")
    return folder


def test_it_prints_what_it_wrote_and_what_was_wrong(run_folder, tmp_path, capsys):
    output = tmp_path / "report.html"
    assert main(["report", str(run_folder), "--published", "-o", str(output)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        str(output),
        str(tmp_path / "report.md"),
        f"{tmp_path / 'report_files'}: 5 pictures",
    ]
    assert "note: run: metrics.json: line 2 cannot be read" in printed.err


@pytest.mark.parametrize("published", [[], ["--published"]])
def test_mistakes_are_one_line_each_and_nothing_is_written(tmp_path, capsys, published):
    arguments = [str(tmp_path / "a"), str(tmp_path / "b"), *published]
    assert main(["report", *arguments, "-o", str(tmp_path / "report.html")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("d2scale: error: RUN is") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_a_mistake(run_folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["report", str(run_folder), "-o", str(tmp_path / "file" / "report.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--output" in line
