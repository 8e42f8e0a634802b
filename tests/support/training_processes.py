"""Runs of a tiny MetaFCOS in processes that a test can kill.

``python training_processes.py train --config-file ...`` is ``d2scale train`` with accidents:
``KILL_RANK`` is killed before iteration ``KILL_BEFORE``, if torchrun has not restarted it yet.
``STAY_BEFORE``, as "3:2 6:1", keeps the last of 2 ranks from iteration 3, a single one from 6.
``KILL_WHILE_WRITING`` names a checkpoint of which only half reaches the disk.
``MEASURE_ON_CPU`` has memory measured on a simulated device, and ``LATE_RANK`` joins every process
group half a second late.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from d2scale import cli
from d2scale.engine import planning
from d2scale.engine.trainer import Trainer
from d2scale.step.ranks import rank, world_size

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
# Two virtual ranks, whose gradients are added in order, give the same bits on any number of GPUs.
SAME_BITS = (
    *("SOLVER.REFERENCE_WORLD_SIZE", "2", "D2SCALE.EXACT", "False"),
    *("D2SCALE.VIRTUAL_RANKS", "on", "D2SCALE.ORDERED_SUM", "True"),
)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_before_a_step() -> None:
    take_step = Trainer.take_step

    def hooked(trainer):
        mine = str(rank()) == os.environ["KILL_RANK"]
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if mine and first and trainer.next_iteration == int(os.environ["KILL_BEFORE"]):
            _die()
        return take_step(trainer)

    Trainer.take_step = hooked


def _stay_before_steps() -> None:
    take_step = Trainer.take_step
    places = os.environ["STAY_BEFORE"].split()

    def hooked(trainer):
        if rank() == world_size() - 1 and f"{trainer.next_iteration}:{world_size()}" in places:
            time.sleep(1000)
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


def _measure_on_cpu() -> None:
    planning.measures = lambda cfg: True


def _come_late() -> None:
    if os.environ["RANK"] != os.environ["LATE_RANK"]:
        return
    init = dist.init_process_group

    def late(*arguments, **options):
        time.sleep(0.5)
        return init(*arguments, **options)

    dist.init_process_group = late


# Spawned ranks import this file under another name.
if __name__ in ("__main__", "__mp_main__"):
    if "KILL_RANK" in os.environ:
        _kill_before_a_step()
    if "STAY_BEFORE" in os.environ:
        _stay_before_steps()
    if "MEASURE_ON_CPU" in os.environ:
        _measure_on_cpu()
    if "LATE_RANK" in os.environ:
        _come_late()
    if "KILL_WHILE_WRITING" in os.environ:
        _kill_while_writing()
if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(cli.main(sys.argv[1:]))
