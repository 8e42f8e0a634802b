"""Runs of a tiny MetaFCOS in processes that a test can kill.

``python training_processes.py train --config-file ...`` is ``d2scale train`` with accidents:
``KILL_RANK`` is killed before iteration ``KILL_BEFORE``, if torchrun has not restarted it yet.
``KILL_WHILE_WRITING`` names a checkpoint of which only half reaches the disk.
"""

from __future__ import annotations

import io
import os
import signal
import sys

import torch

from d2scale import cli
from d2scale.engine.trainer import Trainer

RECIPE = """
_BASE_: d2scale://MetaFCOS/Base-MetaFCOS.yaml
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  RESNETS: {DEPTH: 18, STEM_OUT_CHANNELS: 32, RES2_OUT_CHANNELS: 32, NORM: GN}
  BACKBONE: {FREEZE_AT: 0}
  FPN: {OUT_CHANNELS: 64}
  FCOS: {NUM_CLS_CONVS: 1, NUM_BOX_CONVS: 1}
INPUT: {MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 96}
DATASETS: {TEST: []}
DATALOADER: {NUM_WORKERS: 0}
D2SCALE: {EXACT: true}
SOLVER:
  REFERENCE_WORLD_SIZE: 1
  IMS_PER_BATCH: 4
  BASE_LR: 0.001
  MAX_ITER: 8
  STEPS: [6]
  WARMUP_ITERS: 2
  CHECKPOINT_PERIOD: 2
WRITER_PERIOD: 1
SEED: 7
"""


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_before_a_step() -> None:
    take_step = Trainer.take_step

    def hooked(trainer):
        mine = os.environ.get("RANK", "0") == os.environ["KILL_RANK"]
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if mine and first and trainer.next_iteration == int(os.environ["KILL_BEFORE"]):
            _die()
        return take_step(trainer)

    Trainer.take_step = hooked


def _kill_while_writing() -> None:
    save = torch.save

    def hooked(data, file):
        if os.environ["KILL_WHILE_WRITING"] not in file.name:
            return save(data, file)
        whole = io.BytesIO()
        save(data, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.fsync(file.fileno())
        return _die()

    torch.save = hooked


# Spawned ranks import this file under another name.
if __name__ in ("__main__", "__mp_main__"):
    if "KILL_RANK" in os.environ:
        _kill_before_a_step()
    if "KILL_WHILE_WRITING" in os.environ:
        _kill_while_writing()
if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(cli.main(sys.argv[1:]))
