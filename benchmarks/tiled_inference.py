"""Do tiles find the small objects of large pictures?

    OMP_NUM_THREADS=1 python benchmarks/tiled_inference.py [--pictures 12] [--images-seen 2400]

Trains the small form of MetaFCOS on drawn shapes, then detects on large pictures that are put
together from other such images, some of them enlarged: as a whole at the size of the training, as
a whole at full size, and in tiles whose boxes are merged in several ways. Prints a table and keeps
it, with the machine that it was made on, in results/tiled_inference.json; --draw FOLDER draws a
picture of each row.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fvcore.common.config import CfgNode
from machine import keep, table_of
from PIL import Image
from torch import nn

from d2scale.coco.catalog import register_coco_dataset
from d2scale.coco.classes import BASE_CATEGORY_IDS, COCO_CLASSES
from d2scale.coco.dataset import load_dataset
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.data.loader import build_test_loader
from d2scale.engine.evaluation import evaluate
from d2scale.engine.models import build_model, load_initial_weights
from d2scale.engine.run import train
from d2scale.engine.tiles import Found, TiledDetector, suppress, with_tiles
from d2scale.memory.tracker import StorageTracker
from d2scale.report.drawing import draw_boxes, to_jpeg
from meta_fcos.reproduction.experiments import length_settings

CELL = 64  # pixels; the images that a picture is made of are no larger
TILE = 2 * CELL  # also the size of the images of the training
GRID = 10  # cells of a large picture along an edge
# Of a large picture, what is enlarged: cells along its edge, and row and column where it begins.
ENLARGED = ((4, 0, 5), (3, 6, 1), (2, 2, 1))
FILLED = 0.7  # of the cells
MOST_DETECTIONS = 300
TEST_SET, TRAINING_SET = "large_pictures", "small_pictures"
METRICS = ("AP", "APs", "APm", "APl")

Annotations = list[dict[str, Any]]
Part = tuple[Image.Image, Annotations]
Place = tuple[int, int, int]


class Way(NamedTuple):
    """How large pictures are seen."""

    name: str
    settings: tuple[str, ...] = ()
    nms_alone: bool = False


_TILE = ("D2SCALE.TILES.SIZE", str(TILE))
_ALONE = (*_TILE, "D2SCALE.TILES.WHOLE_IMAGE", "False")
WAYS = (
    Way("whole, resized as in training"),
    Way("whole, full size", ("INPUT.MIN_SIZE_TEST", "0")),
    Way("tiles, NMS alone", _ALONE, nms_alone=True),
    Way("tiles, cut boxes give way", _ALONE),
    Way("tiles and whole image, overlap 0", (*_TILE, "D2SCALE.TILES.OVERLAP", "0")),
    Way("tiles and whole image", _TILE),
    Way("tiles and whole image, overlap 0.4", (*_TILE, "D2SCALE.TILES.OVERLAP", "0.4")),
)


class NmsAlone(TiledDetector):
    """What the plainest way would do: tiles one by one, then NMS."""

    def merge(self, found: Found) -> Found:
        return suppress(found, self.max_dets)


class Peak(nn.Module):
    """Counts the bytes that a detector's forward allocates at most, and its seconds."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.bytes = 0
        self.seconds: list[float] = []

    def forward(self, samples: Sequence[Any]) -> Any:
        start = time.perf_counter()
        if self.bytes:
            outputs = self.detector(samples)
            self.seconds.append(time.perf_counter() - start)
            return outputs
        # Counting takes time, so that one picture is not timed.
        with StorageTracker() as tracker:
            outputs = self.detector(samples)
        self.bytes = tracker.peak_bytes
        return outputs


def compose(root: Path, pictures: int, training_pictures: int) -> None:
    """Write large pictures, and small ones to train on, put together from ``root/coco``."""
    grids = [_cells(GRID, ENLARGED)] * pictures
    # Objects of twice the size, and four images side by side.
    small = [_cells(2, [(2, 0, 0)]), _cells(2)] * (training_pictures // 2)
    for name, split, layouts in ((TEST_SET, "val", grids), (TRAINING_SET, "train", small)):
        parts = _read(root / "coco", split)
        (root / name).mkdir()
        content: dict[str, Any] = {"images": [], "annotations": []}
        content["categories"] = [{"id": i, "name": text} for i, text in COCO_CLASSES.items()]
        draw = np.random.default_rng(0)
        for number, cells in enumerate(layouts, start=1):
            picture, boxes = _compose_one(draw, parts, cells)
            file_name = f"{number}.png"
            picture.save(root / name / file_name)
            size = dict(zip(("width", "height"), picture.size, strict=True))
            content["images"].append({"id": number, "file_name": file_name, **size})
            for box in boxes:
                own = {"id": len(content["annotations"]) + 1, "image_id": number}
                content["annotations"].append({**box, **own})
        (root / f"{name}.json").write_text(json.dumps(content))
        register_coco_dataset(name, root / f"{name}.json", root / name, BASE_CATEGORY_IDS)


def _read(folder: Path, split: str) -> list[Part]:
    """Return the drawn images and their boxes."""
    content = json.loads((folder / "annotations" / f"instances_{split}2017.json").read_text())
    boxes: dict[int, Annotations] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        boxes[annotation["image_id"]].append(annotation)
    return [
        (Image.open(folder / f"{split}2017" / image["file_name"]).copy(), boxes[image["id"]])
        for image in content["images"]
    ]


def _compose_one(
    draw: np.random.Generator, parts: Sequence[Part], cells: Sequence[Place]
) -> tuple[Image.Image, Annotations]:
    edge = max(x + cells for x, _, cells in cells) * CELL
    noise = draw.integers(85, 110, (edge, edge, 3), dtype=np.uint8)
    picture, found = Image.fromarray(noise), []
    for column, row, wide in cells:
        if wide == 1 and draw.random() > FILLED:
            continue
        image, boxes = parts[int(draw.integers(len(parts)))]
        # A little smaller than its place, which so is nothing to learn.
        scale = wide * CELL / max(image.size) * draw.uniform(0.85, 1.0)
        x, y = column * CELL, row * CELL
        picture.paste(image.resize([round(side * scale) for side in image.size]), (x, y))
        for box in boxes:
            left, top, width, height = (value * scale for value in box["bbox"])
            at = {"bbox": [left + x, top + y, width, height], "area": width * height}
            found.append({**box, **at})
    return picture, found


def _cells(grid: int, enlarged: Sequence[Place] = ()) -> list[Place]:
    """Return column, row and cells along an edge of each part of a picture."""
    places = [(column, row, wide) for wide, row, column in enlarged]
    taken = {(x + i, y + j) for x, y, wide in places for i in range(wide) for j in range(wide)}
    free = ((x, y) for y in range(grid) for x in range(grid) if (x, y) not in taken)
    return [*places, *((x, y, 1) for x, y in free)]


def trained(root: Path, images_seen: int) -> Path:
    """Train on small images, and return the weights."""
    cfg = load_cfg("d2scale://MetaFCOS/small-cpu.yaml", _SMALL)
    settings = {**length_settings(cfg, images_seen), "OUTPUT_DIR": str(root / "run")}
    settings |= {"DATASETS.TEST": (), "D2SCALE.IMS_PER_GPU": 8}
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        train(cfg)
    return root / "run" / "model_final.pth"


_SMALL = (
    *("INPUT.MIN_SIZE_TRAIN", f"({TILE},)", "INPUT.MAX_SIZE_TRAIN", str(TILE)),
    *("INPUT.MIN_SIZE_TEST", str(TILE), "INPUT.MAX_SIZE_TEST", str(GRID * CELL)),
    *("MODEL.FCOS.NUM_CLASSES", str(len(BASE_CATEGORY_IDS))),
    *("DATASETS.TRAIN", str((TRAINING_SET,)), "DATASETS.TEST", str((TEST_SET,))),
)


def measure(way: Way, weights: Path, root: Path, draw_to: Path | None) -> dict[str, Any]:
    """Return the row of one way."""
    settings = [*_SMALL, *way.settings, "TEST.DETECTIONS_PER_IMAGE", str(MOST_DETECTIONS)]
    limit = ["MODEL.FCOS.POST_NMS_TOPK_TEST", str(MOST_DETECTIONS)]
    cfg = load_cfg("d2scale://MetaFCOS/small-cpu.yaml", [*settings, *limit])
    model = build_model(cfg).eval()
    load_initial_weights(model, str(weights))
    detector = with_tiles(cfg, model)
    if way.nms_alone:
        detector.__class__ = NmsAlone
    peak = Peak(detector)
    dataset = load_dataset(TEST_SET)
    loader = build_test_loader(
        cfg, dataset, world_size=1, rank=0, keep_above=cfg.D2SCALE.TILES.SIZE
    )
    metrics = evaluate(peak, dataset, loader, root / "results", max_dets=MOST_DETECTIONS)
    assert metrics is not None
    if draw_to is not None:
        draw_first(detector.eval(), cfg, next(iter(loader)), draw_to / f"{way.name}.jpg")
    return {
        "way": way.name,
        **{name: round(metrics[name], 1) for name in METRICS},
        "s a picture": round(float(np.median(peak.seconds)), 3),
        "peak MB": round(peak.bytes / 1e6, 1),
    }


@torch.no_grad()
def draw_first(detector: nn.Module, cfg: CfgNode, samples: Any, path: Path) -> None:
    """Draw what is found on a picture with a score from 0.3."""
    (found,) = detector(samples)
    sure = found["scores"] >= 0.3
    boxes, classes = found["boxes"][sure].numpy(), found["classes"][sure].numpy()
    image = np.asarray(Image.open(samples[0]["file_name"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_jpeg(draw_boxes(image, boxes, classes, ()), 90))


def run(
    root: Path, pictures: int, images_seen: int, draw_to: Path | None = None
) -> list[dict[str, Any]]:
    """Train, compose and measure all ways in an empty folder."""
    write_shapes_dataset(root, 512, 256, image_size=(CELL * 3 // 4, CELL))
    compose(root, pictures, training_pictures=512)
    weights = trained(root, images_seen)
    return [measure(way, weights, root, draw_to) for way in WAYS]


def main() -> None:
    """Measure, keep the rows, print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--images-seen", type=int, default=2400)
    parser.add_argument("--draw", type=Path, metavar="FOLDER")
    parser.add_argument("--discard", action="store_true", help="do not keep the rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="d2scale-") as folder:
        rows = run(Path(folder), options.pictures, options.images_seen, options.draw)
    if not options.discard:
        rows = keep("tiled_inference", rows, "way")
    print(table_of(rows, hidden=("machine",)))


if __name__ == "__main__":
    main()
