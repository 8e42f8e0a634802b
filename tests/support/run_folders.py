"""What run folders hold, made by hand."""

import json
import math

import numpy as np


def annotations(root):
    return json.loads((root / "coco/annotations/instances_val2017.json").read_text())


def detections(root, seed=0, shift=3.0):
    """Return what a middling detector finds: most boxes, not exactly, and a few that are not."""
    rng = np.random.default_rng(seed)
    found = []
    for each in annotations(root)["annotations"]:
        if each["iscrowd"] or rng.random() < 0.2:
            continue
        box = np.array(each["bbox"]) + rng.normal(0, shift, 4)
        box[2:] = np.maximum(box[2:], 2)
        found.append((each["image_id"], each["category_id"], box, rng.uniform(0.3, 1)))
        found.append((each["image_id"], 13, box + 9, rng.uniform(0, 0.6)))
    return [
        {"image_id": i, "category_id": c, "bbox": box.round(2).tolist(), "score": float(s)}
        for i, c, box, s in found
    ]


def step_lines(steps=20, batch=8, **others):
    """Return lines of metrics.json as d2scale writes them, one every second step."""
    return [
        {
            "iteration": step,
            "images_seen": batch * (step + 1),
            "elapsed_seconds": 0.5 * (step + 1),
            "total_loss": 3.0 - 0.1 * step,
            "loss_fcos_cls": 1.0,
            "loss_fcos_ctr": 0.5,
            "loss_fcos_loc": 1.5 - 0.1 * step,
            "lr": 0.01,
            "time": 0.5,
            "data_time": 0.1,
            "eta_seconds": 1.0,
            **others,
        }
        for step in range(1, steps, 2)
    ]


GAIN_CONFIG = {
    "SOLVER": {"IMS_PER_BATCH": 16, "MAX_ITER": 20},
    "D2SCALE": {"LR_RULE": "gain", "RECIPE_IMS_PER_BATCH": 8},
}
GAIN_PLAN = {"lr_rule": "gain", "batch_ratio": 2.0}


def gain_lines(steps=16, gain=1.25, batch=16, **others):
    """Return lines of metrics.json of a run by the gain rule, one every second step."""
    return [
        {
            **line,
            "iteration": math.ceil(gain * line["iteration"] + gain) - 1,
            "recipe_steps": gain * (line["iteration"] + 1),
            "steps": line["iteration"] + 1,
            "gain": gain,
            "noise_scale": 10.0 ** (1 + line["iteration"] / 5),
        }
        for line in step_lines(steps, batch, **others)
    ]
