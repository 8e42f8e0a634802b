"""Commands in a mount namespace of their own, where a disk is as full as a test wants it."""

import shlex
import subprocess

import pytest

_DISK_BYTES = 400 * 2**20
_SCRIPT = """\
mount -t tmpfs -o size={size} tmpfs {folder} || exit 77
head -c {filled} /dev/zero > {folder}/filler
{command}
status=$?
cp -r {folder}/run {kept}
exit $status
"""


def run_on_small_disk(folder, kept, free_bytes, command):
    """Run ``command`` with a disk mounted on ``folder``; return how it ended.

    ``kept`` gets a copy of what the command has left in ``run`` on that disk.
    """
    script = _SCRIPT.format(
        size=_DISK_BYTES,
        folder=folder,
        filled=_DISK_BYTES - free_bytes,
        command=shlex.join(command),
        kept=kept,
    )
    return run_in_namespace(script)


def run_in_namespace(script):
    """Run a shell script that may mount; skip the test where that is not allowed."""
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=200
    )
    if done.returncode == 77 or done.stderr.startswith("unshare"):
        pytest.skip("needs the right to mount a file system of its own")
    return done
