"""A dataset of landscape images in memory; their files are not there and not needed."""

import numpy as np

from d2scale.coco.records import CocoDataset, Records, starts_from_counts


def landscapes(images=40, boxes=3) -> CocoDataset:
    counts = np.full(images, boxes)
    records = Records(
        np.array([b"a.jpg"] * images),
        np.arange(images),
        np.full(images, 480),
        np.full(images, 640),
        starts_from_counts(counts),
        np.zeros((counts.sum(), 4), dtype=np.float32),
        np.zeros(counts.sum(), dtype=np.int64),
    )
    return CocoDataset("shapes", ("thing",), (1,), records, "")
