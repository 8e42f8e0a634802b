"""What has run out is told in one line."""

import errno
import logging
import threading
from pathlib import Path

import pytest

from d2scale.errors import D2ScaleError
from d2scale.run_folder.shortages import free_space, log_calmly, telling_of_shortages


def told(error, *folders):
    with pytest.raises(D2ScaleError) as raised, telling_of_shortages(*folders):
        raise error
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_full_disk_names_the_file_or_the_folder_and_its_space(tmp_path):
    number = errno.ENOSPC
    line = told(OSError(number, "No space left on device", str(tmp_path / "a")))
    assert line.startswith(f"{tmp_path / 'a'} cannot be written: No space left on device, ")
    assert "free on its disk; make room" in line
    assert told(OSError(number, "x"), tmp_path).startswith(f"{tmp_path} cannot be written")


def test_what_torch_says_of_a_full_disk_is_said_in_the_systems_words(tmp_path):
    error = RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert "No space left on device" in told(error, tmp_path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, "x"), r"Too many open files: .*lower DATALOADER\.NUM_WORKERS"),
        (RuntimeError("pair.cc: socket: Too many open files"), "Too many open files: "),
        (RuntimeError("can't start new thread"), r"no more processes or threads.*ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "x"), "no more processes"),
        (OSError(errno.EROFS, "x", "/a/b"), "/a/b cannot be written: Read-only file system"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "set TMPDIR"),
    ],
)
def test_each_shortage_says_what_to_do(error, words):
    with pytest.raises(D2ScaleError, match=words), telling_of_shortages():
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOENT, "x"),
        # What print() raises for a full pipe that must not block.
        BlockingIOError(errno.EAGAIN, "write could not complete without blocking", 0),
        RuntimeError("shape"),
        KeyError(1),
    ],
)
def test_another_error_stays_what_it_is(error):
    with pytest.raises(type(error)) as raised, telling_of_shortages():
        raise error
    assert raised.value is error


def test_a_thread_that_meets_a_shortage_is_a_line_in_the_log(caplog, capsys):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    before = threading.excepthook
    with telling_of_shortages():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert "No space left on device" in caplog.text
    assert capsys.readouterr().err == ""
    assert threading.excepthook is before


def test_a_log_that_cannot_be_written_is_told_once(tmp_path, capsys):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    handler = log_calmly(logging.FileHandler(full))
    for _ in range(3):
        handler.handle(logging.LogRecord("a", logging.INFO, "b", 1, "text", (), None))
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(OSError, match="No space"):
        handler.close()


def test_free_space_of_a_path_to_come(tmp_path):
    assert free_space(tmp_path / "no" / "such") == free_space(tmp_path / "other")
