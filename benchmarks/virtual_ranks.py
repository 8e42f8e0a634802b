"""Do virtual ranks train what the recipe's cluster trains?

    OMP_NUM_THREADS=1 python benchmarks/virtual_ranks.py [--only cluster own float32 time]
        [--models RetinaNet FCOS ...]

Needs detectron2, and d2go for its own model. Models of their recipes with random weights are
trained by detectron2's own trainer on several processes, and by d2scale's step on fewer. The
images are drawn, or those of coco_2017_train under DETECTRON2_DATASETS, at most 128 pixels wide
and high. Prints tables and keeps them, with the machine, in results/virtual_ranks.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import chain, combinations
from typing import Any

import torch
from machine import keep
from tabulate import tabulate
from upstream_models import MODELS, body_of
from upstream_steps import (
    Trained,
    Training,
    step_seconds,
    take_turns,
    train_on_cluster,
    train_virtual_ranks,
)

from d2scale.launch.launch import launch
from d2scale.launch.topology import Topology

ALLOWED = 1e-10
FLOAT32 = ("RetinaNet", "FCOS", "Faster R-CNN")
TIMED = ("RetinaNet", "Faster R-CNN", "Mask R-CNN")
# Which virtual rank each of detectron2's processes is: a sum has other roundings in another order.
ORDERS = ((0, 1, 2, 3), (2, 0, 3, 1), (3, 1, 0, 2))
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args()
    for part in args.only:
        found = PARTS[part](args.models)
        rows = [{"part": part, **row} for row in found]
        # Models that were not asked for keep their rows.
        keep("virtual_ranks", [{**row, "key": f"{part}, {row['model']}"} for row in rows], "key")
        keys = [key for key in dict.fromkeys(chain(*rows)) if key != "part"]
        print(f"\n{part}")
        print(tabulate([[row.get(key, "") for key in keys] for row in rows], keys, tablefmt="pipe"))


def cluster_rows(names: list[str]) -> Rows:
    """Weights after 5 steps of 4 processes of detectron2's, and of virtual ranks on fewer."""
    trainings = [Training(name) for name in names]
    clusters = on_ranks(4, train_on_cluster, trainings, (0, 1, 2, 3))
    rows: Rows = []
    alone: list[Trained] = []
    for processes in (1, 2, 3):
        summed = on_ranks(processes, train_virtual_ranks, trainings, False)
        ordered = on_ranks(processes, train_virtual_ranks, trainings, True)
        alone = alone or ordered
        for name, cluster, plain, own, first in zip(
            names, clusters, summed, ordered, alone, strict=True
        ):
            row = {"model": name, "body": body_of(name), "processes": processes}
            row |= compared(plain, cluster)
            row["ordered addition"] = relative(own, cluster)
            same = torch.equal(own.weights, first.weights)
            row["ordered, bit-equal on 1 process"] = "yes" if same else "NO"
            rows.append(row)
    return sorted(rows, key=lambda row: names.index(row["model"]))


def own_rows(names: list[str]) -> Rows:
    """detectron2's loader and trainer on 2 processes, and d2scale's on 1, on the same images."""
    names = [name for name in names if name in ("RetinaNet", "FCOS")]
    trainings = [Training(name, virtual_ranks=2, data="COCO", flips=False) for name in names]
    own_loader = [training._replace(data="detectron2") for training in trainings]
    clusters = on_ranks(2, train_on_cluster, own_loader, (0, 1))
    alone = on_ranks(1, train_virtual_ranks, trainings, False)
    return [
        {"model": name, "body": body_of(name), "images": "COCO", **compared(found, cluster)}
        for name, cluster, found in zip(names, clusters, alone, strict=True)
    ]


def float32_rows(names: list[str]) -> Rows:
    """20 steps in float32, beside what the order of its processes makes of detectron2's own."""
    names = [name for name in names if name in FLOAT32]
    trainings = [Training(name, steps=20, dtype="float32", data="COCO") for name in names]
    clusters = [on_ranks(4, train_on_cluster, trainings, order) for order in ORDERS]
    rows = []
    for processes in (1, 2, 3):
        trained = on_ranks(processes, train_virtual_ranks, trainings, False)
        for name, found, *others in zip(names, trained, *clusters, strict=True):
            most = max(relative(found, other) for other in others)
            own = max(relative(a, b) for a, b in combinations(others, 2))
            rows.append(
                {"model": name, "body": body_of(name), "processes": processes,
                 "of the change": most, "detectron2 in other orders": own,
                 "holds": "yes" if most <= own else "NO", "loss": round(found.loss, 3)}
            )  # fmt: skip
    return sorted(rows, key=lambda row: names.index(row["model"]))


def time_rows(names: list[str]) -> Rows:
    """Processor time of a step on one process, beside plain steps of the same micro-batches."""
    rows = []
    for name in (name for name in names if name in TIMED):
        seconds = step_seconds(Training(name, steps=22, dtype="float32"))
        plain = seconds.pop("plain")
        rows += [
            {"model": name, "body": body_of(name), "step": kind, "ms": round(1000 * found, 1),
             "plain ms": round(1000 * plain, 1), "change": f"{found / plain - 1:+.1%}"}
            for kind, found in seconds.items()
        ]  # fmt: skip
    return rows


def compared(found: Trained, cluster: Trained) -> dict[str, Any]:
    """Return how far a training is from the cluster's, as a part of its change of the weights."""
    error = relative(found, cluster)
    buffers = float(torch.dist(found.buffers, cluster.buffers) / cluster.buffers.norm())
    return {
        "of the change": error,
        "holds": "yes" if error < ALLOWED else "NO",
        "buffers and normalizers": float(f"{buffers:.2g}"),
        "change": float(f"{cluster.change:.2g}"),
        "loss": round(found.loss, 3),
    }


def relative(found: Trained, other: Trained) -> float:
    return float(f"{torch.dist(found.weights, other.weights) / other.change:.2g}")


def on_ranks(
    processes: int, function: Callable[..., Trained], trainings: list[Training], *arguments: Any
) -> list[Trained]:
    """Return what the first of so many processes gets of each training."""
    found: list[Trained] = launch(
        take_turns, (function, trainings, *arguments), Topology(processes), use_cuda=False
    )
    return found


PARTS = {"cluster": cluster_rows, "own": own_rows, "float32": float32_rows, "time": time_rows}

if __name__ == "__main__":
    main()
