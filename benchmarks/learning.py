"""Does it learn? The three published experiments in small, until they know their images by heart.

    OMP_NUM_THREADS=1 python benchmarks/learning.py [--output-dir output/learning]

Trains d2scale://MetaFCOS/overfit-cpu.yaml from random weights on COCO under DETECTRON2_DATASETS,
which should hold a hundred images or so, and judges it on the images it was trained on. The run
folders stay, for `d2scale report`. Training goes on where an earlier call stopped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import keep
from tabulate import tabulate

from d2scale.config import load_cfg
from d2scale.engine.run import train
from d2scale.launch.launch import Topology
from d2scale.run_folder.files import METRICS_FILE
from meta_fcos.reproduction.final_loss import FinalLoss, compare, final_loss

RECIPE = "d2scale://MetaFCOS/overfit-cpu.yaml"


@dataclass(frozen=True)
class Trial:
    """One way to train the recipe.

    Attributes:
        name: of the published experiment that it follows, and of its folder.
        processes: ranks.
        method: scaling method.
        options: config keys that differ from the recipe.
    """

    name: str
    processes: int
    method: str
    options: tuple[str, ...] = ()


# As published; auto would be the gain rule.
LINEAR = ("D2SCALE.LR_RULE", "linear")
TRIALS = (
    Trial("1 baseline", 2, "keep_total"),
    Trial("2 same batch", 1, "keep_total"),
    Trial("3 large batch", 2, "max_memory", ("D2SCALE.IMS_PER_GPU", "8", *LINEAR)),
)


def run(trial: Trial, folder: Path) -> tuple[dict[str, Any], FinalLoss]:
    """Train, evaluate, and return the row of the table and the final loss."""
    output = folder / ("experiment-" + trial.name.replace(" ", "-"))
    cfg = load_cfg(RECIPE, ["OUTPUT_DIR", str(output), *trial.options])
    results = train(
        cfg,
        Topology(trial.processes),
        method=trial.method,
        resume=(output / "last_checkpoint").exists(),
    )
    lines = [json.loads(line) for line in (output / METRICS_FILE).read_text().splitlines()]
    steps = [line for line in lines if "total_loss" in line]
    loss = final_loss(
        [step["iteration"] + 1 for step in steps], [step["total_loss"] for step in steps]
    )
    assert loss is not None
    plan = json.loads((output / "plan.json").read_text())
    row = {
        "experiment": trial.name,
        "processes": trial.processes,
        "images a step": plan["ims_per_batch"],
        "images seen": steps[-1]["images_seen"],
        "minutes": round(_minutes(steps), 1),
        "final loss": str(loss),
        "AP": round(results["bbox/AP"], 1),
        "AP50": round(results["bbox/AP50"], 1),
    }
    return row, loss


def _minutes(steps: list[dict[str, Any]]) -> float:
    """Time of the steps, their loading included; evaluation not."""
    before, seconds = -1, 0.0
    for step in steps:
        seconds += step["time"] * (step["iteration"] - before)
        before = step["iteration"]
    return seconds / 60


def main() -> None:
    """Train all, keep the rows, print them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("output/learning"), metavar="DIR")
    folder = parser.parse_args().output_dir
    made, baseline = [], None
    for trial in TRIALS:
        row, loss = run(trial, folder)
        baseline = baseline or loss
        row["against 1"] = compare(loss, baseline) if loss is not baseline else ""
        made.append(row)
    kept = keep("learning", made, "experiment")
    shown = [{k: v for k, v in row.items() if k != "machine"} for row in kept]
    print(tabulate(shown, headers="keys", tablefmt="pipe"))


if __name__ == "__main__":
    main()
