"""What can happen to loader workers: one is killed, hangs, or outlives its rank."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from d2scale.config.value_rules import number
from d2scale.errors import D2ScaleError

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOADER_TIMEOUT = number("D2SCALE.LOADER_TIMEOUT_SECONDS", above=0, advice="600 is usual")
# After so long a wait is told.
TOLD_AFTER_SECONDS = 15
_SHM = "/dev/shm"  # noqa: S108  where torch shares memory, on Linux
_MORE_SHM = "give it more, in Docker by --shm-size 8g"
_SPARE_BYTES = 2**16
_MOST_AT_A_TIME = 256  # workers that may share without a look at each other
_ADVICE = "then go on with --resume"


def patiently(chunks: Iterator[T], timeout_seconds: float) -> Iterator[T]:
    """Yield what workers make; tell of a long wait, and end it after ``timeout_seconds``.

    ``chunks`` is an iterator of torch's loader whose own timeout is ``TOLD_AFTER_SECONDS``. Raises
    D2ScaleError at the end of the patience, and for a worker that has ended.
    """
    waited = 0
    while True:
        try:
            yield next(chunks)
            waited = 0
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:
            # Pixels are in shared memory that only a living worker hands over. Why it has ended
            # comes by a signal, whose handler raises: best here.
            time.sleep(1.0)
            raise _lost(f"a worker of the loader has ended ({error})") from error
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
            waited += TOLD_AFTER_SECONDS
            _tell_or_give_up(waited, timeout_seconds)


def check_room_for(workers: int) -> None:
    """Raise a D2ScaleError if /dev/shm has no room for the locks of a loader's workers."""
    if not workers or not os.path.isdir(_SHM):
        return
    # Each lock has a page: three are a queue's, five an event's; a queue to each worker, one back.
    needed = (8 + 3 * workers) * os.sysconf("SC_PAGE_SIZE")
    if (free := _room()) < needed:
        raise D2ScaleError(
            f"shared memory ({_SHM}) has {free // 1024} KiB free, and {workers} workers of a "
            f"loader need {needed // 1024} for their locks alone; {_MORE_SHM}, or set "
            f"DATALOADER.NUM_WORKERS 0, {_ADVICE}"
        )


def share(tensor: torch.Tensor) -> bool:
    """Move a tensor to shared memory; return whether there was room.

    Older versions of torch do not ask for the room: a process that writes where there is none ends
    by a bus error. So it is asked for here, and where it is short one worker shares at a time.
    """
    needed = tensor.untyped_storage().nbytes() + _SPARE_BYTES
    try:
        if not os.path.isdir(_SHM) or _room() > _MOST_AT_A_TIME * needed:
            tensor.share_memory_()
            return True
        with _only_worker():
            if _room() < needed:
                return False
            tensor.share_memory_()
            return True
    except (OSError, RuntimeError):
        return False


def _room() -> int:
    return shutil.disk_usage(_SHM).free


@contextmanager
def _only_worker() -> Iterator[None]:
    """Within the context, keep out all other workers on this machine, of any rank."""
    import fcntl  # not on Windows, which has no such folder

    folder = os.open(_SHM, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def tell_of_full_shm() -> None:
    """Warn that images go through pipes, to be called once by whoever notices."""
    logger.warning(
        "Shared memory is full (/dev/shm), or too few files may be open: images go through pipes, "
        "which is slower; %s, raise ulimit -n, or lower DATALOADER.NUM_WORKERS",
        _MORE_SHM,
    )


def _tell_or_give_up(waited: float, timeout_seconds: float) -> None:
    if waited >= timeout_seconds:
        raise D2ScaleError(
            f"the loader's workers made no image for {waited} s; look at the disk that "
            "holds the images and at free memory, set DATALOADER.NUM_WORKERS 0 to see "
            f"what an image does, or raise {LOADER_TIMEOUT.key}, {_ADVICE}"
        ) from None
    logger.warning("Waiting for the loader's workers for %d s, until %g s", waited, timeout_seconds)


@contextmanager
def telling_of_lost_workers() -> Iterator[None]:
    """Within the context, let a worker that was killed be one line.

    torch raises that wherever the rank happens to be, for it learns of it by a signal.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise _lost(str(error).partition("\n")[0].rstrip(". ")) from error


def _lost(reason: str) -> D2ScaleError:
    advice = f"was it killed for want of host memory? Lower DATALOADER.NUM_WORKERS, {_ADVICE}"
    return D2ScaleError(f"{reason}; {advice}")
