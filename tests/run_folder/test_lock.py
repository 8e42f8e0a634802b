import subprocess
import sys

import pytest

from d2scale.errors import ConfigError
from d2scale.run_folder.lock import refuse_locked, run_lock

REFUSE = """
import sys
from pathlib import Path
from d2scale.errors import ConfigError
from d2scale.run_folder.lock import refuse_locked
try:
    refuse_locked(Path(sys.argv[1]))
except ConfigError as error:
    sys.exit(str(error))
"""


def refused_elsewhere(folder):
    """Return what another process is told of the lock, empty if nothing."""
    command = [sys.executable, "-c", REFUSE, str(folder)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False).stderr


def test_the_lock_ends_with_its_context(tmp_path):
    refuse_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with run_lock(tmp_path):
        assert "no other run is writing to" in refused_elsewhere(tmp_path)
    refuse_locked(tmp_path)
    assert refused_elsewhere(tmp_path) == ""
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_second_use_in_the_same_process_is_refused_and_the_lock_stays(tmp_path, through_a_link):
    folder = tmp_path / "run"
    folder.mkdir()
    same = folder
    if through_a_link:
        same = tmp_path / "link"
        same.symlink_to(folder)
    with run_lock(folder):
        with pytest.raises(ConfigError, match="this process"), run_lock(same):
            pass
        with pytest.raises(ConfigError, match="this process") as raised:
            refuse_locked(same)
        assert len(str(raised.value).splitlines()) == 1
        assert "no other run is writing to" in refused_elsewhere(folder)


def test_a_lock_that_cannot_be_made_is_a_fault(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ConfigError, match="OUTPUT_DIR"), run_lock(tmp_path):
        pass


def test_parts_of_checkpoints_that_a_kill_left_are_removed(tmp_path):
    for name in (".model_0000001.pth.12ab.partial", "model_0000001.pth", ".mine.partial"):
        (tmp_path / name).touch()
    with run_lock(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock",
        ".mine.partial",
        "model_0000001.pth",
    }


def test_a_full_disk_is_a_folder_that_cannot_be_used(tmp_path, monkeypatch):
    def write(descriptor, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d2scale.run_folder.lock.os.write", write)
    told = pytest.raises(ConfigError, match=r"OUTPUT_DIR is .*No space left on device, .* free")
    with told, run_lock(tmp_path):
        pass
