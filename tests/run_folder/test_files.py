import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from d2scale.errors import CheckpointError, ConfigError, Fault
from d2scale.run_folder.files import folder_faults, make_folder, write_atomically


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["text", b"text", lambda file: file.write(b"text")])
def test_a_file_is_written_and_replaced(tmp_path, content):
    path = tmp_path / "file"
    write_atomically(path, "an older and longer text")
    write_atomically(path, content)
    assert path.read_bytes() == b"text"
    assert names(tmp_path) == ["file"]


def test_the_umask_is_respected_and_the_mode_of_an_older_file_kept(tmp_path, umask):
    path = tmp_path / "file"
    write_atomically(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    path.chmod(0o604)
    write_atomically(path, "newer")
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_links_are_followed(tmp_path):
    (tmp_path / "there").mkdir()
    for target in ("there/file", "there/new"):
        link = tmp_path / f"link-{Path(target).name}"
        link.symlink_to(target)
        write_atomically(link, "text")
        assert link.is_symlink()
        assert (tmp_path / target).read_text() == "text"
    assert names(tmp_path / "there") == ["file", "new"]


def test_a_pipe_is_written_to(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read = []
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    write_atomically(path, "text")
    reader.join()
    assert read == ["text"]
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_device_is_written_to(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(os.devnull)
    write_atomically(link, "text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert link.is_symlink()
    with pytest.raises(ConfigError, match="No space left on device"):
        write_atomically("/dev/full", "text")


@pytest.mark.parametrize("mode", ["wb", "ab"])
def test_standard_output_is_written_to_wherever_it_goes(tmp_path, mode):
    code = (
        "from d2scale.run_folder.files import write_atomically as w;"
        "print('one', flush=True); w('/dev/stdout', 'two\\n'); print('three')"
    )
    path = tmp_path / "output"
    path.write_text("zero\n")
    with open(path, mode) as output:
        subprocess.run([sys.executable, "-c", code], stdout=output, check=True)
    expected = "one\ntwo\nthree\n"
    assert path.read_text() == ("zero\n" if mode == "ab" else "") + expected
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == expected


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("odd\npos")]
)
def test_a_failure_leaves_the_older_file_alone(tmp_path, error):
    def fail(file):
        file.write(b"half")
        raise error

    path = tmp_path / "file"
    write_atomically(path, "older")
    with pytest.raises(
        ConfigError, match=r"No space left on device, .*free on its disk$|odd$"
    ) as raised:
        write_atomically(path, fail)
    assert len(str(raised.value).splitlines()) == 1
    assert path.read_text() == "older"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_told_as_the_system_says_it(tmp_path):
    def fill(file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            # As torch.save does: its archive is closed although a part could not be written.
            raise RuntimeError("unexpected pos 704 vs 598")

    with pytest.raises(ConfigError, match=r"check it: No space left on device, "):
        write_atomically(tmp_path / "file", fill)


def test_ctrl_c_leaves_nothing(tmp_path):
    def interrupt(file):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", interrupt)
    assert names(tmp_path) == []


def test_the_caller_chooses_the_error(tmp_path):
    def error_of(reason):
        return CheckpointError([Fault("checkpoint", 1, "another", reason)])

    with pytest.raises(CheckpointError, match="No such file or directory"):
        write_atomically(tmp_path / "no" / "file", "text", error_of)


@pytest.mark.parametrize("name", ["a folder", "file/below", "x" * 300])
def test_places_where_nothing_can_be_written(tmp_path, name):
    (tmp_path / "a folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError):
        write_atomically(tmp_path / name, "text")
    assert names(tmp_path) == ["a folder", "file"]


def test_folders_that_can_be_written(tmp_path):
    for folder in (tmp_path, tmp_path / "new" / "newer", Path("new")):
        assert folder_faults(folder) == []
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "a\0b"])
def test_folders_that_cannot_be_written(tmp_path, name):
    (tmp_path / "file").touch()
    (fault,) = folder_faults(tmp_path / name, key="--output-dir")
    assert fault.key == "--output-dir"
    with pytest.raises(ConfigError, match="--output-dir") as raised:
        make_folder(tmp_path / name, key="--output-dir")
    assert len(str(raised.value).splitlines()) == 1


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr("d2scale.run_folder.files.os.access", lambda path, mode: False)
    (fault,) = folder_faults(tmp_path / "new")
    assert f"{tmp_path} cannot be written to" in str(fault)
