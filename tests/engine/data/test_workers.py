"""Loader workers that cannot share memory, are killed, hang or are left alone."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from d2scale.engine.data import chunks
from d2scale.engine.data.chunks import ChunkDataset, LoaderOptions, Request, load_chunks
from d2scale.errors import D2ScaleError
from d2scale.launch import workers
from small_disks import run_in_namespace

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

HERE = Path(__file__).parent
SIDE = 256  # an image has 196 608 bytes


class Drawn(ChunkDataset):
    """Makes images of one colour; an image whose number is its ``fault`` does what it says."""

    def _make(self, request):
        if request.image == 2:
            FAULTS[self.order]()
        return torch.full((3, SIDE, SIDE), request.image, dtype=torch.uint8), {"image_id": 0}


FAULTS = {
    "BGR": lambda: None,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(60),
}


def load(fault="BGR", count=4, workers=1, timeout=60.0):
    """Load images one by one; return the colours that came."""
    requests = ([Request(number, None)] for number in range(count))
    options = LoaderOptions(num_workers=workers, timeout_seconds=timeout)
    loaded = load_chunks(Drawn(None, fault, False), requests, options)
    return [int(sample["image"].float().mean()) for (sample,) in loaded]


def test_a_worker_that_is_killed_is_one_line():
    # Which of two errors torch raises depends on the moment.
    told = pytest.raises(D2ScaleError, match=r"killed.*Lower DATALOADER\.NUM_WORKERS")
    with told as raised, workers.telling_of_lost_workers():
        load("killed")
    assert "\n" not in str(raised.value)


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shape"), workers.telling_of_lost_workers():
        raise RuntimeError("shape")


def test_a_worker_that_hangs_is_told_and_given_up(monkeypatch, caplog):
    for module in (chunks, workers):
        monkeypatch.setattr(module, "TOLD_AFTER_SECONDS", 1)
    with caplog.at_level(logging.WARNING), pytest.raises(D2ScaleError, match="no image for 2 s"):
        load("hangs", timeout=2.0)
    assert "Waiting for the loader's workers for 1 s, until 2 s" in caplog.text


def test_workers_end_with_a_rank_that_is_killed_as_it_starts_them(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path[:0] = {[str(HERE), str(HERE.parents[1] / 'support')]!r}\n"
        "from d2scale.engine.data import chunks\n"
        "import test_workers\n"
        "dataset = test_workers.Drawn(None, 'hangs', False)\n"
        "requests = ([test_workers.Request(2, None)] for _ in range(9))\n"
        "chunks._start_workers(dataset, requests, chunks.LoaderOptions(num_workers=2), 0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # The workers hold the pipe open for as long as they live.
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, timeout=40)
    assert done.returncode == -signal.SIGKILL


IN_A_SMALL_SHM = """\
mount -t tmpfs -o size={size} tmpfs /dev/shm || exit 77
exec {python} -c "
import logging, sys
logging.basicConfig()
sys.path[:0] = ['{folder}', '{folder}/../../support']
import test_workers
print(test_workers.load(count=12, workers=2))"
"""


@pytest.mark.parametrize("size", ["64k", "1m"])
def test_a_full_shm_is_slower_not_a_hang(size):
    done = run_in_namespace(IN_A_SMALL_SHM.format(size=size, python=sys.executable, folder=HERE))
    assert done.stdout.strip() == str(list(range(12))), done.stderr
    assert done.stderr.count("Shared memory is full (/dev/shm)") == 1


def test_no_room_for_the_locks_of_workers_is_one_line(monkeypatch):
    monkeypatch.setattr(workers, "_room", lambda: 2**15)
    with pytest.raises(D2ScaleError, match=r"32 KiB free.*1 workers .* need 44 .*NUM_WORKERS 0"):
        load()
