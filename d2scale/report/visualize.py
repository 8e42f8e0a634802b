"""Draw a checkpoint's detections on test images beside the ground truth, or on any images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn

from d2scale.coco.class_count import known_class_names
from d2scale.coco.matching import GroundTruth, corners_of
from d2scale.config.value_rules import judge
from d2scale.engine.checkpoint.files import last_whole_checkpoint
from d2scale.engine.config import load_cfg
from d2scale.engine.data.images import resize_and_flip
from d2scale.engine.data.sampling import Draw
from d2scale.engine.data.transforms import ResizeAndFlip
from d2scale.engine.models import build_model, load_initial_weights
from d2scale.engine.tiles import TILE_RULES, with_tiles
from d2scale.errors import CheckpointError, ConfigError, DataError, Fault
from d2scale.report.detections import evaluation_spec, read_evaluation_set
from d2scale.report.drawing import draw_boxes, to_jpeg
from d2scale.report.examples import read_images, spread_images
from d2scale.run_folder.files import CONFIG_FILE, folder_fault, make_folder, write_atomically

DEFAULT_IMAGES = 8
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_JPEG_QUALITY = 90
# More unknown keys than a person misspells: the config of another engine.
_MANY_FAULTS = 20
_GAP = 8  # pixels between ground truth and detections

# Boxes, x0 y0 x1 y1 in pixels of the image, shape (n, 4), classes and scores, both shape (n,).
Detected = tuple[np.ndarray, np.ndarray, np.ndarray]
Task = tuple[Path, GroundTruth | None]  # an image to draw on, and the boxes to draw beside it


class Visualization(NamedTuple):
    """The pictures of a call."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]  # images that could not be read


def visualize(
    target: Path,
    output: Path,
    *,
    inputs: Sequence[Path] = (),
    config_file: str | None = None,
    opts: Sequence[str] = (),
    score_threshold: float = 0.3,
) -> Visualization:
    """Draw the detections of a checkpoint file, or of the last checkpoint of a run's folder.

    Args:
        inputs: images and folders of images; by default a few of ``DATASETS.TEST``, with the
            ground truth on the left.
        config_file: by default ``config.yaml`` beside the checkpoint.

    Raises:
        ConfigError: for a config that cannot be used, or a folder that cannot be written.
        CheckpointError: for a checkpoint that is not there, broken, or of another model.
        DataError: if no image can be read.
    """
    if not 0 <= score_threshold <= 1:
        raise ConfigError([Fault("--score-threshold", score_threshold, "0 to 1", "correct it")])
    config, checkpoint = _find_checkpoint(target, config_file)
    cfg = _load_cfg(config, opts)
    tasks, wanted = _tasks(cfg, inputs)
    detector = _load_detector(cfg, checkpoint)
    make_folder(output, key="--output")
    errors: list[tuple[Path, DataError]] = []
    files: list[Path] = []
    for path, truth, image in read_images(tasks, wanted, errors):
        picture = _draw(cfg, image, truth, _detect(cfg, detector, image, score_threshold))
        files.append(_free_name(output, path.stem, files))
        _write(files[-1], to_jpeg(picture, _JPEG_QUALITY))
    notes = tuple(f"skipped: {error}" for _, error in errors)
    if not files:
        allowed = "at least one image that can be read"
        raise DataError([Fault("images", 0, allowed, "; ".join(notes) or "there are none")])
    return Visualization(tuple(files), notes)


def _load_detector(cfg: CfgNode, checkpoint: Path) -> nn.Module:
    model = build_model(cfg).eval()
    load_initial_weights(model, str(checkpoint))
    return with_tiles(cfg, model).eval()


def _write(path: Path, content: bytes) -> None:
    def error_of(reason: str) -> ConfigError:
        return ConfigError([folder_fault(path.parent, reason, key="--output")])

    write_atomically(path, content, error_of)


def _find_checkpoint(target: Path, config_file: str | None) -> tuple[str, Path]:
    """Return the config and the checkpoint; an error if either is missing."""
    folder, checkpoint, advice = target.parent, target, "check the path"
    if target.is_dir():
        last = last_whole_checkpoint(target)
        folder, checkpoint = target, last[0] if last else target
        advice = "train longer, or name a checkpoint file"
    if not checkpoint.is_file():
        allowed = "the folder of a run with a checkpoint, or a checkpoint file"
        raise CheckpointError([Fault("RUN", str(target), allowed, advice)])
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
        advice = "draw it with the engine that trained it, or give its model's --config-file"
        advice = f"{len(error.faults)} keys are not; {advice}"
        fault = Fault("config file", path, "a config of the default engine", advice)
        raise ConfigError([fault]) from error
    faults, key = judge(cfg, TILE_RULES), "D2SCALE.TILES.OVERLAP"
    if not faults and key in opts and not cfg.D2SCALE.TILES.SIZE:
        faults.append(Fault(key, cfg.D2SCALE.TILES.OVERLAP, "none without tiles", "add --tile"))
    if faults:
        raise ConfigError(faults)
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _tasks(cfg: CfgNode, inputs: Sequence[Path]) -> tuple[Iterable[Task], int]:
    """Return images to draw on, and how many pictures are wanted of them."""
    if inputs:
        tasks: list[Task] = [(path, None) for named in inputs for path in _images_in(named)]
        if not tasks:
            names, allowed = ", ".join(map(str, inputs)), f"images ({' '.join(_SUFFIXES)})"
            raise DataError([Fault("--input", names, allowed, "name others")])
        return tasks, len(tasks)
    if not cfg.DATASETS.TEST:
        raise DataError([Fault("DATASETS.TEST", (), "a dataset", "name images by --input")])
    name = cfg.DATASETS.TEST[0]
    dataset = read_evaluation_set(name, evaluation_spec(name, cfg))
    images = spread_images(dataset, DEFAULT_IMAGES)
    return ((dataset.path_of(i), dataset.boxes_of(i)) for i in images), DEFAULT_IMAGES


def _images_in(path: Path) -> list[Path]:
    """Return a file itself, or the images in a folder, judged by their names."""
    if not path.is_dir():
        return [path]
    try:
        return sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
    except OSError as error:
        advice = f"choose another ({error.strerror})"
        raise DataError([Fault("--input", str(path), "a readable folder", advice)]) from error


@torch.no_grad()
def _detect(cfg: CfgNode, detector: nn.Module, image: np.ndarray, threshold: float) -> Detected:
    height, width = image.shape[:2]
    resizing = replace(ResizeAndFlip.for_testing(cfg), keep_above=cfg.D2SCALE.TILES.SIZE)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    pixels = resize_and_flip(pixels, resizing.draw(0, Draw(0, 0), height, width), cfg.INPUT.FORMAT)
    (instances,) = detector([{"image": pixels, "height": height, "width": width, "image_id": 0}])
    boxes, classes, scores = (
        instances[name].float().cpu().numpy() for name in ("boxes", "classes", "scores")
    )
    kept = scores >= threshold
    return boxes[kept], classes[kept], scores[kept]


def _draw(
    cfg: CfgNode, image: np.ndarray, truth: GroundTruth | None, detected: Detected
) -> np.ndarray:
    """Return the picture, RGB, shape (height, width, 3): ground truth left, detections right."""
    names = known_class_names(cfg)
    boxes, classes, scores = detected
    right = draw_boxes(image, boxes, classes, names, scores)
    if truth is None:
        return right
    left = draw_boxes(image, corners_of(truth.boxes), truth.classes, names)
    gap = np.full((len(image), _GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def _free_name(output: Path, stem: str, taken: Sequence[Path]) -> Path:
    """Return a name that no other picture of this call has; older ones are replaced."""
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    return next(path for name in names if (path := output / f"{name}.jpg") not in taken)
