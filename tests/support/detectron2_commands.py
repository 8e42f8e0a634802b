"""Trainings of plain detectron2, run as a user does, and small recipes for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SUPPORT = Path(__file__).resolve().parent
SCRIPT = str(SUPPORT / "scaled_script.py")
COMMAND = ["-m", "d2scale", "train"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

RETINANET = """
MODEL:
  DEVICE: cpu
  META_ARCHITECTURE: RetinaNet
  WEIGHTS: ""
  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: BN, OUT_FEATURES: [res3, res4, res5]}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  FPN: {IN_FEATURES: [res3, res4, res5], OUT_CHANNELS: 16}
  RETINANET: {NUM_CONVS: 1}
DATASETS: {TRAIN: [coco_2017_train], TEST: [coco_2017_val]}
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [64, 96], MAX_SIZE_TRAIN: 128, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
SOLVER: {REFERENCE_WORLD_SIZE: 4, IMS_PER_BATCH: 4, MAX_ITER: 6, STEPS: [4], WARMUP_ITERS: 1,
         CHECKPOINT_PERIOD: 2, BASE_LR: 0.001}
TEST: {EVAL_PERIOD: 0}
SEED: 1
"""

LAZY = """
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7

zoo = get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
dataloader, lr_multiplier, model = zoo.dataloader, zoo.lr_multiplier, zoo.model
optimizer, train = zoo.optimizer, zoo.train

stages = model.backbone.bottom_up.stages
stages.depth, stages.norm = 18, "BN"
del stages.stride_in_1x1
model.backbone.bottom_up.stem.norm = "BN"
model.backbone.bottom_up.freeze_at = 0
model.backbone.out_channels = 16
model.backbone.top_block.in_channels = 512
model.head.input_shape = [ShapeSpec(channels=16)] * 5
model.head.conv_dims = [16]
for loader in (dataloader.train, dataloader.test):
    resize = loader.mapper.augmentations[0]
    resize.short_edge_length, resize.max_size = [64, 64], 96
dataloader.train.num_workers = dataloader.test.num_workers = 0
dataloader.train.total_batch_size = 4
optimizer.lr = 0.001
lr_multiplier.warmup_length = 0.1
train.device, train.init_checkpoint, train.max_iter, train.seed = "cpu", "", 6, 1
train.eval_period, train.checkpointer.period = 0, 2
d2scale = dict(reference_world_size=4)
# What stays is the config.
del loader, resize, stages, zoo
"""


class Trainings:
    """Runs trainings in a folder; returns what they print and checks their exit status."""

    def __init__(self, folder: Path, datasets: Path, recipe: str = RETINANET) -> None:
        self.folder = folder
        self._datasets = datasets
        self.recipe = folder / ("recipe.py" if "LazyCall" in recipe else "recipe.yaml")
        self.recipe.write_text(recipe)

    def __call__(
        self,
        out: str,
        *words: str,
        program: tuple[str, ...] | list[str] = COMMAND,
        processes: int = 1,
        status: int = 0,
        **variables: object,
    ) -> str:
        key = "train.output_dir=" if self.recipe.suffix == ".py" else "OUTPUT_DIR "
        number = [] if program[0] == TORCHRUN[0] and "torch" in program[1] else ["--num-gpus"]
        command = [
            *(sys.executable, *program, "--config-file", str(self.recipe)),
            *(*number, *([str(processes)] if number else [])),
            *([word for word in words if word.startswith("--")]),
            *f"{key}{self.folder / out}".split(),
            *(word for word in words if not word.startswith("--")),
        ]
        done = subprocess.run(
            command,
            env=self._environment(variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        output = done.stdout + done.stderr
        assert done.returncode == status or (status < 0 and done.returncode), output[-6000:]
        return output

    def _environment(self, variables: dict[str, object]) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH", "")]))
        own = {
            "DETECTRON2_DATASETS": self._datasets,
            "OMP_NUM_THREADS": 1,
            "PYTHONPATH": path,
            **variables,
        }
        return {**os.environ, **{key: str(value) for key, value in own.items()}}

    def checkpoint(self, out: str, name: str = "model_final.pth") -> dict[str, Any]:
        """Return a checkpoint of a run."""
        content: dict[str, Any] = torch.load(
            self.folder / out / name, map_location="cpu", weights_only=True
        )
        return content


def difference(checkpoint: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the distance of the weights of two checkpoints, over the length of the second's.

    As one vector: a bias that started at zero consists of roundings.
    """
    ours, theirs = (
        torch.cat([value.double().flatten() for _, value in sorted(content["model"].items())])
        for content in (checkpoint, expected)
    )
    return float(torch.dist(ours, theirs) / theirs.norm())


def errors(output: str) -> list[str]:
    """Return the lines that tell a user of a mistake."""
    return [line for line in output.splitlines() if line.startswith("d2scale: error")]
