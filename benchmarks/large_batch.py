"""Does a larger batch cost quality? Every learning-rate rule at every batch, on three datasets.

    OMP_NUM_THREADS=1 python benchmarks/large_batch.py --dataset shapes [--output-dir output/large]

Trains d2scale://MetaFCOS/small-cpu.yaml, shorter and on smaller images, from random weights with
batches of 1/2 to 8 times the recipe's. Datasets: drawn shapes; COCO, of which a few images are
learned by heart and judged on themselves (DETECTRON2_DATASETS); handwritten digits (scikit-learn).
What is in the results already is not trained again. --table only prints.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

from digits import write_digits_dataset
from machine import RESULTS, keep
from tabulate import tabulate

from d2scale.coco.catalog import ROOT_VARIABLE, datasets_root
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.run import train
from d2scale.run_folder.files import METRICS_FILE, PLAN_FILE
from meta_fcos.reproduction.data import Data, datasets_under, make, read_subset
from meta_fcos.reproduction.experiments import length_settings
from meta_fcos.reproduction.final_loss import final_loss

RECIPE = "d2scale://MetaFCOS/small-cpu.yaml"
RULES = ("none", "sqrt", "linear", "gain")
# The linear rule with momentum to the power of the batch ratio, as the gain rule has it: what is
# left of the gain rule without the gain.
CONTROL = "linear, momentum^k"
RATIOS = (Fraction(1), Fraction(2), Fraction(4), Fraction(8), Fraction(1, 2))
# Images of one forward: the recipe's 8 are two parts, half of them one.
IMS_PER_GPU = 4
RECIPE_BATCH = 8
CURVES = ("recipe steps", "gain", "noise scale", "loss")


@dataclass(frozen=True)
class Dataset:
    """Images to learn, and how long."""

    name: str
    images_seen: int  # by the recipe's own batch
    options: tuple[str, ...] = ()


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset("shapes", 2000),
        Dataset(
            "coco by heart",
            3200,
            ("DATASETS.TEST", "('coco_pretrain_train_base',)", "INPUT.RANDOM_FLIP", "none"),
        ),
        Dataset("digits", 3000, ("INPUT.RANDOM_FLIP", "none")),
    )
}
SMALL = ("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MAX_SIZE_TRAIN", "160")
SMALL += ("INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "160")


@dataclass(frozen=True)
class Trial:
    """One training."""

    dataset: Dataset
    rule: str
    ratio: Fraction  # of its batch and the recipe's
    seed: int

    @property
    def name(self) -> str:
        """What its row is kept under."""
        return f"{self.rule} x{float(self.ratio):g} seed {self.seed}"


def trials(
    dataset: Dataset, seeds: int, rules: Sequence[str], ratios: Sequence[Fraction]
) -> Iterator[Trial]:
    """Yield all trainings of a dataset, seed by seed; at the recipe's batch all rules are one."""
    for seed, ratio in product(range(1, seeds + 1), ratios):
        for rule in rules if ratio != 1 else ("recipe",):
            yield Trial(dataset, rule, ratio, seed)


def data_root(dataset: Dataset, folder: Path) -> Path:
    """Make the dataset and return the value of DETECTRON2_DATASETS for it."""
    root = (folder / dataset.name.replace(" ", "-") / "data").absolute()
    if dataset.name == "shapes":
        write_shapes_dataset(root, 512, 64)
    elif dataset.name == "digits":
        write_digits_dataset(root, 512, 128)
    else:
        data = Data(root, "", "", (84, 1), datasets_root().absolute() / "coco")
        make(data, read_subset(data))
    return root


def run(trial: Trial, folder: Path) -> dict[str, Any]:
    """Train, evaluate and return the row of the table."""
    output = run_folder(trial, folder)
    shutil.rmtree(output, ignore_errors=True)
    cfg = load_cfg(RECIPE, [*SMALL, *trial.dataset.options])
    settings = {
        **length_settings(cfg, trial.dataset.images_seen),
        "SEED": trial.seed,
        "OUTPUT_DIR": str(output),
        "D2SCALE.LR_RULE": "linear" if trial.rule == "recipe" else trial.rule,
        "D2SCALE.IMS_PER_GPU": IMS_PER_GPU,
        "D2SCALE.ACCUMULATION_STEPS": int(trial.ratio * RECIPE_BATCH / IMS_PER_GPU),
        "SOLVER.CHECKPOINT_PERIOD": 0,
        "WRITER_PERIOD": 1,
    }
    if trial.rule == CONTROL:
        momentum, decay = cfg.SOLVER.MOMENTUM, cfg.SOLVER.MOMENTUM ** float(trial.ratio)
        settings["D2SCALE.LR_RULE"] = "linear"
        settings["SOLVER.MOMENTUM"] = decay
        settings["SOLVER.BASE_LR"] = cfg.SOLVER.BASE_LR * (1 - decay) / (1 - momentum)
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    with contextlib.redirect_stdout(io.StringIO()):
        train(cfg, method="max_memory")
    shutil.rmtree(output / "inference", ignore_errors=True)
    for checkpoint in output.glob("*.pth"):
        checkpoint.unlink()
    return row_of(trial, output)


def run_folder(trial: Trial, folder: Path) -> Path:
    """Return the folder of a trial's run."""
    return folder / trial.dataset.name.replace(" ", "-") / trial.name.replace(" ", "-")


def row_of(trial: Trial, output: Path) -> dict[str, Any]:
    """Return the row of the table from the folder of a finished run."""
    plan = json.loads((output / PLAN_FILE).read_text())
    assert plan["ims_per_batch"] == trial.ratio * RECIPE_BATCH
    *steps, evaluation = map(json.loads, (output / METRICS_FILE).read_text().splitlines())
    losses = [line["total_loss"] for line in steps]
    loss = final_loss([line["iteration"] + 1 for line in steps], losses)
    assert loss is not None
    return {
        "trial": trial.name,
        "rule": trial.rule,
        "ratio": float(trial.ratio),
        "seed": trial.seed,
        "AP": round(evaluation["bbox/AP"], 2),
        "final loss": round(loss.mean, 4),
        "steps": len(steps),
        "images": steps[-1]["images_seen"],
        "seconds": round(steps[-1]["elapsed_seconds"], 1),
        "recipe steps": _curve([line.get("recipe_steps", n + 1) for n, line in enumerate(steps)]),
        "gain": _curve([line.get("gain", 1.0) for line in steps]),
        "noise scale": _curve([line.get("noise_scale") or math.inf for line in steps]),
        "loss": _curve(losses),
    }


def _curve(values: list[float]) -> str:
    """Return some thirty of a training's values, evenly apart, the last among them."""
    apart = -(-len(values) // 30)
    return " ".join(f"{value:.4g}" for value in values[::-1][::apart][::-1])


def kept_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """Return what the results hold of a dataset."""
    path = RESULTS / f"{_results_name(dataset)}.json"
    return json.loads(path.read_text()) if path.exists() else []


def _results_name(dataset: Dataset) -> str:
    return "large_batch_" + dataset.name.replace(" ", "_")


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each rule and batch: means over the seeds, and how far from the recipe."""
    cells: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["ratio"], _order(row["rule"]))):
        cells.setdefault((row["ratio"], row["rule"]), []).append(row)
    recipe = cells.get((1.0, "recipe"), [])
    shown = []
    for (ratio, rule), of_cell in cells.items():
        ap, error = mean_and_error([row["AP"] for row in of_cell])
        recipe_ap, recipe_error = mean_and_error([row["AP"] for row in recipe])
        noise = math.hypot(error, recipe_error)
        steps = statistics.fmean(row["steps"] for row in of_cell)
        of_recipe = statistics.fmean(row["steps"] for row in recipe) if recipe else math.nan
        shown.append(
            {
                "batch": f"{ratio:g} x",
                "rule": rule,
                "AP": f"{ap:.1f} ± {error:.1f}",
                "against the recipe": ""
                if rule == "recipe"
                else f"{ap - recipe_ap:+.1f}, {abs(ap - recipe_ap) / noise:.1f} errors",
                "final loss": round(statistics.fmean(row["final loss"] for row in of_cell), 3),
                "steps": round(steps),
                "steps saved": f"{1 - steps / of_recipe:.0%}",
                "images": round(statistics.fmean(row["images"] for row in of_cell)),
                "seconds": round(statistics.fmean(row["seconds"] for row in of_cell)),
                "seeds": len(of_cell),
            }
        )
    return shown


def _order(rule: str) -> int:
    return ("recipe", *RULES, CONTROL).index(rule)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    if len(values) < 2:
        return statistics.fmean(values) if values else math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    """Train what is missing, keep the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--dataset", choices=(*DATASETS, "all"), default="all")
    add("--output-dir", type=Path, default=Path("output/large"), metavar="DIR")
    add("--seeds", type=int, default=3, metavar="N")
    help_text = f"some of {','.join(RULES)}; or control: {CONTROL}"
    add("--rules", default=",".join(RULES), metavar="LIST", help=help_text)
    add("--ratios", default=",".join(map(str, RATIOS)), metavar="LIST", help="some of 1,2,4,8,1/2")
    add("--table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    rules = [CONTROL if rule == "control" else rule for rule in arguments.rules.split(",")]
    ratios = [Fraction(ratio) for ratio in arguments.ratios.split(",")]
    chosen = DATASETS.values() if arguments.dataset == "all" else [DATASETS[arguments.dataset]]
    for dataset in chosen:
        if not arguments.table:
            wanted = trials(dataset, arguments.seeds, rules, ratios)
            _train_missing(dataset, list(wanted), arguments.output_dir)
        print(f"\n{dataset.name}\n")
        print(tabulate(summary(kept_rows(dataset)), headers="keys", tablefmt="pipe"))


def _train_missing(dataset: Dataset, wanted: Sequence[Trial], folder: Path) -> None:
    known = {row["trial"] for row in kept_rows(dataset)}
    root = data_root(dataset, folder)
    with datasets_under(root):
        for trial in wanted:
            if trial.name not in known:
                row = run(trial, folder)
                keep(_results_name(dataset), [row], "trial")
                facts = {k: v for k, v in row.items() if k not in CURVES}
                print(facts, flush=True)


if __name__ == "__main__":
    os.environ.setdefault(ROOT_VARIABLE, "datasets")
    main()
