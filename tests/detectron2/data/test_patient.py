"""detectron2's loaders with a full /dev/shm, and with workers that are killed or hang."""

import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from d2scale.errors import D2ScaleError
from d2scale.launch import workers
from small_disks import run_in_namespace

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

SIDE = 256  # an image has 196 608 bytes
IMAGES = 12
HERE = Path(__file__).resolve().parent


class Drawing:
    """Maps the entry of an image to one of a single colour, or does what its fault says."""

    def __init__(self, fault=None):
        self._fault = fault

    def __call__(self, entry):
        if self._fault and entry["image_id"] == 2:
            FAULTS[self._fault]()
        image = torch.full((3, SIDE, SIDE), entry["image_id"], dtype=torch.uint8)
        return {**entry, "image": image, "empty": torch.empty(0, 4), "view": image[0]}


FAULTS = {"killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "hangs": lambda: time.sleep(60)}
ENTRIES = [{"image_id": number, "width": SIDE, "height": SIDE} for number in range(IMAGES)]


def colours(samples):
    return [int(sample["image"].float().mean()) for sample in samples]


def train_colours(fault=None, timeout=60.0):
    """The sorted colours of an epoch of the training loader."""
    from detectron2.data import build_detection_train_loader
    from detectron2.data.samplers import TrainingSampler

    from d2scale.detectron2.data.loader import train_loader

    loader = build_detection_train_loader(
        ENTRIES,
        mapper=Drawing(fault),
        sampler=TrainingSampler(IMAGES, seed=0),
        total_batch_size=2,
        num_workers=2,
        aspect_ratio_grouping=False,
    )
    steps = train_loader(loader, range(2), 2, 1, timeout)
    return sorted(colour for _ in range(IMAGES // 2) for colour in colours(next(steps)))


def evaluation_colours():
    """The colours of the test loader, in its order."""
    from detectron2.data import build_detection_test_loader

    from d2scale.detectron2.data.patient import patient

    loader = patient(build_detection_test_loader(ENTRIES, mapper=Drawing(), num_workers=2), 60)
    assert len(loader) == IMAGES
    return [colour for samples in loader for colour in colours(samples)]


IN_A_SMALL_SHM = """\
mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 77
exec {python} -c "
import logging, sys
logging.basicConfig()
sys.path[:0] = ['{here}', '{support}']
import test_patient
print(test_patient.train_colours(), test_patient.evaluation_colours())"
"""


def test_a_full_shm_is_slower_not_a_hang():
    support = HERE.parents[1] / "support"
    script = IN_A_SMALL_SHM.format(python=sys.executable, here=HERE, support=support)
    done = run_in_namespace(script)
    expected = str(list(range(IMAGES)))
    assert done.stdout.strip() == f"{expected} {expected}", done.stderr
    assert done.stderr.count("Shared memory is full (/dev/shm)") == 2  # once a loader


def test_samples_are_what_the_mapper_made(caplog):
    assert train_colours() == list(range(IMAGES))
    assert "Shared memory" not in caplog.text


def test_a_worker_that_is_killed_is_one_line():
    told = pytest.raises(D2ScaleError, match=r"killed.*Lower DATALOADER\.NUM_WORKERS")
    with told as raised, workers.telling_of_lost_workers():
        train_colours("killed")
    assert "\n" not in str(raised.value)


def test_a_worker_that_hangs_is_told_and_given_up(monkeypatch, caplog):
    from d2scale.detectron2.data import patient

    for module in (patient, workers):
        monkeypatch.setattr(module, "TOLD_AFTER_SECONDS", 1)
    with caplog.at_level(logging.WARNING), pytest.raises(D2ScaleError, match="no image for 2 s"):
        train_colours("hangs", timeout=2.0)
    assert "Waiting for the loader's workers for 1 s, until 2 s" in caplog.text


def test_what_wraps_a_loader_keeps_its_samples():
    from detectron2.data.common import AspectRatioGroupedDataset
    from torch.utils.data import DataLoader

    from d2scale.detectron2.data.patient import PatientLoader, patient

    inner = DataLoader(ENTRIES, num_workers=1, batch_size=None, collate_fn=Drawing())
    wrapped = patient(AspectRatioGroupedDataset(inner, 3), 60)
    assert isinstance(wrapped.dataset, PatientLoader)
    assert [colours(batch) for batch in wrapped] == [[i, i + 1, i + 2] for i in range(0, IMAGES, 3)]
