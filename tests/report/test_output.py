import os
from pathlib import Path

import pytest

from d2scale.errors import ConfigError
from d2scale.report.output import check_output, write_files


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_report_and_its_successor(tmp_path):
    output = tmp_path / "new" / "report.html"
    files = write_files(output, "page", "markdown", {"a.png": b"a", "b.png": b"b"})
    assert (files.html.read_text(), files.markdown.read_text()) == ("page", "markdown")
    assert [path.read_bytes() for path in files.pictures] == [b"a", b"b"]
    files = write_files(output, "page 2", "markdown 2", {"c.png": b"c"})
    assert tree(output.parent) == {
        "report.html": b"page 2",
        "report.md": b"markdown 2",
        "report_files/.made-by-d2scale-report": b"",
        "report_files/c.png": b"c",
    }
    assert sorted(os.listdir(output.parent)) == ["report.html", "report.md", "report_files"]


def test_what_cannot_be_written_leaves_the_older_report(tmp_path):
    output = tmp_path / "report.html"
    write_files(output, "page", "markdown", {"a.png": b"a"})
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="--output"):
        write_files(output, "page 2", "markdown 2", {"x" * 300: b"a"})
    assert tree(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.md", "report_files"]


class FailingSteps:
    """Fails at one of the calls that write or rename a file."""

    def __init__(self, patch, failing, error):
        self.calls = []
        for owner, name in ((Path, "write_bytes"), (Path, "write_text"), (os, "replace")):
            real = getattr(owner, name)
            patch.setattr(owner, name, self.step(name, real, failing, error))

    def step(self, name, real, failing, error):
        def call(*arguments, **keywords):
            self.calls.append(name)
            if len(self.calls) == failing:
                raise error
            return real(*arguments, **keywords)

        return call


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("older", [True, False])
def test_a_failure_at_any_step_leaves_the_older_report_whole(tmp_path, monkeypatch, older, error):
    output = tmp_path / "report.html"
    if older:
        write_files(output, "page", "markdown", {"a.png": b"a"})
    before, names = tree(tmp_path), sorted(os.listdir(tmp_path))
    for failing in range(1, 100):
        with monkeypatch.context() as patch:
            steps = FailingSteps(patch, failing, error)
            try:
                write_files(output, "page 2", "markdown 2", {"b.png": b"b", "c.png": b"c"})
            except (ConfigError, KeyboardInterrupt):
                assert tree(tmp_path) == before
                assert sorted(os.listdir(tmp_path)) == names
            else:
                break
    # Two pictures, two texts, and three renames, or as many more where older files give way.
    assert len(steps.calls) == (10 if older else 7)
    assert tree(tmp_path)["report_files/b.png"] == b"b"


def test_a_folder_in_place_of_the_markdown_is_refused(tmp_path):
    output = tmp_path / "report.html"
    write_files(output, "page", "markdown", {"a.png": b"a"})
    (tmp_path / "report.md").unlink()
    (tmp_path / "report.md").mkdir()
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="--output"):
        write_files(output, "page 2", "markdown 2", {"b.png": b"b"})
    assert tree(tmp_path) == before


def test_foreign_files_are_not_replaced(tmp_path):
    (tmp_path / "report_files").mkdir()
    (tmp_path / "report_files" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="report_files"):
        check_output(tmp_path / "report.html")


@pytest.mark.parametrize("name", ["report", "report.txt", "folder.html", "file/report.html"])
def test_places_that_are_none(tmp_path, name):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--output") as raised:
        check_output(tmp_path / name)
    assert len(str(raised.value).splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.html"]


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr("d2scale.report.output.os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="cannot be written to"):
        check_output(tmp_path / "report.html")
