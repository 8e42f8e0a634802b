import os

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
