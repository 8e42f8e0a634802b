"""Draw what a checkpoint detects: on a few test images beside the truth, or on any images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn

from d2scale.coco.catalog import dataset_names, dataset_spec
from d2scale.coco.matching import corners_of
from d2scale.config import load_cfg
from d2scale.engine.checkpoint.files import last_whole_checkpoint
from d2scale.engine.data.images import read_image, resize_and_flip
from d2scale.engine.data.sampling import Draw
from d2scale.engine.data.transforms import ResizeAndFlip
from d2scale.engine.models import build_model, device_of, load_initial_weights
from d2scale.errors import CheckpointError, ConfigError, DataError, Fault
from d2scale.report.detections import GroundTruth, GroundTruths
from d2scale.report.drawing import draw_boxes, to_jpeg
from d2scale.report.examples import spread_images
from d2scale.run_folder.files import CONFIG_FILE, folder_fault, make_folder, write_atomically

DEFAULT_IMAGES = 8
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_JPEG_QUALITY = 90
# More unknown keys than a person misspells: the config of another engine.
_MANY_FAULTS = 20
_GAP = 8  # pixels between the truth and what was found


@dataclass(frozen=True)
class Visualization:
    """What was drawn.

    Attributes:
        files: the pictures.
        notes: images that could not be read.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Task:
    """An image to draw on; with ground truth, it is drawn beside.

    Attributes:
        path: the image file.
        boxes: x0 y0 x1 y1 in pixels, shape (n, 4); None without ground truth.
        classes: shape (n,); None without ground truth.
    """

    path: Path
    boxes: np.ndarray | None = None
    classes: np.ndarray | None = None


def visualize(
    target: Path,
    output: Path,
    *,
    inputs: Sequence[Path] = (),
    config_file: str | None = None,
    opts: Sequence[str] = (),
    score_threshold: float = 0.3,
) -> Visualization:
    """Draw the detections of a checkpoint.

    Args:
        target: a run's folder, whose last checkpoint is taken, or a checkpoint file.
        output: folder of the pictures; made if it is not there.
        inputs: images, and folders of images. Without any, a few images of ``DATASETS.TEST``
            are taken, and the ground truth stands on the left.
        config_file: of the model; by default ``config.yaml`` beside the checkpoint.
        opts: ``KEY VALUE`` pairs that win over the config.
        score_threshold: detections below are not drawn.

    Raises:
        ConfigError: for a config that cannot be used, or a folder that cannot be written.
        CheckpointError: for a checkpoint that is not there, broken, or of another model.
        DataError: if no image can be read.
    """
    if not 0 <= score_threshold <= 1:
        advice = "choose one between them"
        raise ConfigError([Fault("--score-threshold", score_threshold, "0 to 1", advice)])
    config, checkpoint = _find(target, config_file)
    cfg = _load_cfg(config, opts)
    tasks, wanted = _tasks(cfg, inputs)
    model = build_model(cfg).eval()
    load_initial_weights(model, str(checkpoint))
    make_folder(output, key="--output")
    files: list[Path] = []
    notes: list[str] = []
    for task in tasks:
        if len(files) == wanted or len(notes) > max(wanted, DEFAULT_IMAGES):
            break
        try:
            image = read_image(str(task.path))
        except DataError as error:
            notes.append(f"skipped: {error}")
            continue
        drawn = _draw(cfg, model, image, task, score_threshold)
        path = _free_name(output, task.path.stem, files)
        write_atomically(path, to_jpeg(drawn, _JPEG_QUALITY), partial(_output_error, output))
        files.append(path)
    if not files:
        allowed = "at least one image that can be read"
        found = ", ".join(map(str, inputs)) or "DATASETS.TEST"
        raise DataError([Fault("images", found, allowed, "; ".join(notes) or "there are none")])
    return Visualization(tuple(files), tuple(notes))


def _find(target: Path, config_file: str | None) -> tuple[str, Path]:
    """Return the config and the checkpoint.

    Raises:
        CheckpointError: if there is no checkpoint.
        ConfigError: if there is no config.
    """
    if target.is_dir():
        folder, found = target, last_whole_checkpoint(target)
        if found is None:
            advice = "train longer, or name a checkpoint file"
            raise CheckpointError([Fault("RUN", str(target), "a run with a checkpoint", advice)])
        checkpoint = found[0]
    elif target.is_file():
        folder, checkpoint = target.parent, target
    else:
        allowed = "the folder of a run, or a checkpoint file"
        raise CheckpointError([Fault("RUN", str(target), allowed, "check the path")])
    if config_file is None and not (folder / CONFIG_FILE).is_file():
        allowed = f"a folder with {CONFIG_FILE}"
        raise ConfigError([Fault("RUN", str(folder), allowed, "give the model's --config-file")])
    return config_file or str(folder / CONFIG_FILE), checkpoint


def _load_cfg(path: str, opts: Sequence[str]) -> CfgNode:
    try:
        cfg = load_cfg(path, opts)
    except ConfigError as error:
        if len(error.faults) <= _MANY_FAULTS:
            raise
        allowed = "a config of the default engine"
        advice = (
            f"{len(error.faults)} keys are not; draw it with the engine that trained it, or give "
            "its model's --config-file"
        )
        raise ConfigError([Fault("config file", path, allowed, advice)]) from error
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _tasks(cfg: CfgNode, inputs: Sequence[Path]) -> tuple[Iterable[_Task], int]:
    """Return images to draw on, and how many pictures are wanted of them."""
    if inputs:
        paths = [path for each in inputs for path in _images_in(each)]
        if not paths:
            found = ", ".join(map(str, inputs))
            allowed = f"images ({' '.join(_SUFFIXES)})"
            raise DataError([Fault("--input", found, allowed, "name others")])
        return [_Task(path) for path in paths], len(paths)
    if not cfg.DATASETS.TEST:
        raise DataError([Fault("DATASETS.TEST", (), "a dataset", "name images by --input")])
    truth = GroundTruths().of(cfg.DATASETS.TEST[0])
    return _with_truth(truth), DEFAULT_IMAGES


def _images_in(path: Path) -> list[Path]:
    """Return a file itself, or what a folder holds that is called an image."""
    if not path.is_dir():
        return [path]
    try:
        return sorted(each for each in path.iterdir() if each.suffix.lower() in _SUFFIXES)
    except OSError as error:
        advice = f"choose another ({error.strerror})"
        raise DataError([Fault("--input", str(path), "a readable folder", advice)]) from error


def _with_truth(truth: GroundTruth) -> Iterator[_Task]:
    for number in spread_images(truth, DEFAULT_IMAGES):
        own = truth.objects_of(number)
        path = truth.image_root / truth.file.file_names[number]
        yield _Task(path, corners_of(own.boxes), own.classes)


@torch.no_grad()
def _draw(
    cfg: CfgNode, model: nn.Module, image: torch.Tensor, task: _Task, threshold: float
) -> np.ndarray:
    """Return the picture, RGB, shape (height, width, 3): ground truth left, detections right."""
    height, width = (int(edge) for edge in image.shape[1:])
    resizing = ResizeAndFlip.for_testing(cfg).draw(0, Draw(0, 0), height, width)
    pixels = resize_and_flip(image, resizing, cfg.INPUT.FORMAT).to(device_of(cfg))
    sample = {"image": pixels, "height": height, "width": width, "image_id": 0}
    (found,) = model([{**sample, "file_name": str(task.path)}])
    boxes, classes, scores = (
        found[name].float().cpu().numpy() for name in ("boxes", "classes", "scores")
    )
    kept = scores >= threshold
    original = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    names = _class_names(cfg)
    right = draw_boxes(original, boxes[kept], classes[kept], names, scores[kept])
    if task.boxes is None or task.classes is None:
        return right
    left = draw_boxes(original, task.boxes, task.classes, names)
    gap = np.full((height, _GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def _class_names(cfg: CfgNode) -> tuple[str, ...]:
    """Return the names that the config's datasets have for the model's classes, if they do."""
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        names = dataset_spec(name).class_names if name in dataset_names() else None
        if names:
            return names
    return ()


def _free_name(output: Path, stem: str, taken: Sequence[Path]) -> Path:
    """Return a name that no other picture of this call has; older ones are replaced."""
    number, path = 1, output / f"{stem}.jpg"
    while path in taken:
        number += 1
        path = output / f"{stem}-{number}.jpg"
    return path


def _output_error(output: Path, reason: str) -> ConfigError:
    return ConfigError([folder_fault(output, reason, key="--output")])
