"""Does the split of a step change the training, and what does keeping it the same cost?

    python benchmarks/exactness.py [--only gradients weights time] [--steps 10]

Trains a small MetaFCOS (ResNet-18, GN) on small images with 1 to 4 processes on CPUs. The images
are those of coco_2017_train under DETECTRON2_DATASETS, or drawn shapes if there are none. Prints
a table and keeps it, with the machine that it was made on, in results/exactness.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from machine import keep, table_of
from split_steps import (
    ORDERS,
    Tensors,
    default_dtype,
    distance,
    exact_seconds,
    gradient_errors,
    guard_seconds,
    new_model,
    noise_seconds,
    on_ranks,
    recipe,
    split_seconds,
    trained_weights,
    weights_of,
)

from d2scale.coco.shapes import write_shapes_dataset

# 13 is uneven on every number of ranks but one.
BATCHES = (16, 13)
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}  # of a gradient
# Ranks and images per GPU of which the weights are compared with those of the first.
SPLITS = ((1, 16), (1, 3), (2, 8), (4, 3))

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--steps", type=int, default=10, help="of the weights and time rows")
    parser.add_argument("--discard", action="store_true", help="do not keep the rows")
    args = parser.parse_args()
    with datasets() as data, recipe() as cfg:
        for part in args.only:
            print(f"\n{part}, {data}", flush=True)
            rows = []
            for row in PARTS[part](cfg, args.steps):
                rows.append({"part": part, "data": data, **row})
                print(*row.values(), sep=", ", file=sys.stderr, flush=True)
            print(table_of(rows, hidden=("part", "data")), flush=True)
            if not args.discard:
                keep("exactness", rows, "part")


@contextmanager
def datasets() -> Iterator[str]:
    """Make coco_2017_train readable and say what it is."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    if (root / "coco" / "annotations").exists():
        yield "COCO images"
        return
    with tempfile.TemporaryDirectory() as folder:
        write_shapes_dataset(Path(folder), 64, 2, image_size=(64, 96))
        os.environ["DETECTRON2_DATASETS"] = folder
        yield "drawn shapes"


def gradient_rows(cfg: CfgNode, steps: int) -> Iterator[Row]:
    """Gradient of one step against that of the one big batch."""
    cases = [
        {"dtype": dtype, "total batch": total, "micro-batches": a, "guard": guard}
        for dtype in TOLERANCE
        for total in BATCHES
        for a in (1, 2, 4)
        for guard in (False, True)
    ]
    for ranks in (1, 2, 3, 4):
        for case, errors in zip(cases, on_ranks(ranks, gradient_errors, cfg, cases), strict=True):
            allowed = TOLERANCE[case["dtype"]]
            yield {"ranks": ranks, **case, **verdict(*errors, allowed)}


def weight_rows(cfg: CfgNode, steps: int) -> Iterator[Row]:
    """Weights after some steps against those of one rank and one piece, as shares of their change.

    A training amplifies rounding, so float32 is judged by the largest distance between two runs of
    one and the same command, split or not, whose ranks take their images in other orders.
    """
    wholes: dict[str, list[Tensors]] = {}
    for ranks, ims_per_gpu in SPLITS:
        cases = [
            {"dtype": dtype, "images per GPU": ims_per_gpu, "guard": True, "order": order}
            for dtype in TOLERANCE
            for order in ORDERS
        ]
        weights = on_ranks(ranks, trained_weights, cfg, cases, steps)
        for dtype in TOLERANCE:
            runs, weights = weights[: len(ORDERS)], weights[len(ORDERS) :]
            whole = wholes.setdefault(dtype, runs)
            with default_dtype(dtype):
                apart = partial(distance, before=weights_of(new_model(cfg)))
            if runs is whole:
                continue
            pairs = chain(combinations(whole, 2), combinations(runs, 2))
            error, spread = apart(runs[0], whole[0]), max(apart(*pair) for pair in pairs)
            allowed = 1e-8 if dtype == "float64" else spread
            split = {"ranks": ranks, "dtype": dtype, "images per GPU": ims_per_gpu, "steps": steps}
            yield {
                **split,
                "of the change": float(f"{error:.2g}"),
                "other orders": float(f"{spread:.2g}"),
                "holds": "yes" if error <= allowed else "NO",
            }


def verdict(error: float, rounding: float, allowed: float) -> dict[str, Any]:
    """Judge an error; ``rounding`` is that of the big batch itself, in float32.

    With one image oneDNN takes other kernels than with several, and where a ReLU stands at zero
    the two may fall on different sides: then no split can be nearer than the big batch's own
    distance from the exact gradient.
    """
    holds = "yes" if error < allowed else "to rounding" if error < 2 * rounding else "NO"
    found = {"relative error": float(f"{error:.2g}"), "allowed": allowed, "holds": holds}
    return {**found, "big batch's rounding": float(f"{rounding:.2g}")} if rounding else found


def time_rows(cfg: CfgNode, steps: int) -> Iterator[Row]:
    """Milliseconds of a step, the median of several, and of what it is compared with."""
    measured = [
        (1, guard_seconds, "16 images, guarded", "plain"),
        (2, guard_seconds, "16 images, guarded", "plain: DDP averages during backward"),
        (1, split_seconds, "4 micro-batches of 4, exact", "4 plain ones"),
        (1, partial(noise_seconds, 8), "2 micro-batches of 8, noise measured", "not measured"),
        (2, partial(noise_seconds, 8), "2 ranks of 8, noise measured", "not measured"),
        (1, partial(noise_seconds, 16), "16 images cut in two to measure", "in one part"),
        (1, exact_seconds, "16 images and their loading, EXACT on", "EXACT off"),
    ]
    for ranks, function, name, against in measured:
        before, after = (1000 * seconds for seconds in on_ranks(ranks, function, cfg, steps))
        yield {
            "ranks": ranks,
            "step": name,
            "ms": round(after, 1),
            "against": against,
            "its ms": round(before, 1),
            "change": f"{after / before - 1:+.1%}",
        }


PARTS: dict[str, Callable[[CfgNode, int], Iterator[Row]]] = {
    "gradients": gradient_rows,
    "weights": weight_rows,
    "time": time_rows,
}


if __name__ == "__main__":
    main()
