"""``d2scale demo``: from the 64-GPU recipe to four trained detectors on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from d2scale.config import load_recipe
from d2scale.errors import ConfigError
from d2scale.planning.formats import plan_table
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan
from d2scale.run_folder.files import LOCK_FILE, folder_fault, make_folder, reason_of
from d2scale.run_folder.lock import refuse_locked, run_lock
from meta_fcos.reproduction.prepare import ReproductionOptions
from meta_fcos.reproduction.reproduction import reproduce

RECIPE = "d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml"
# A little shorter than small-cpu, so that it ends within five minutes on two cores. The large
# batch is trained by the gain rule, and for comparison with the linear rate that was published.
OPTIONS = ReproductionOptions("demo", form="small", images_seen=2000, only="1,2,gain,3")
# Marks a folder that the demo made, and may make anew.
_MARKER = "made-by-d2scale-demo"
_RUNS = "runs"
_OPTION = "--output-dir"


def run_demo(output_dir: str) -> Iterator[str]:
    """Plan, train, compare and report, yielding each piece of text to print when it is known.

    ``output_dir`` gets the marker of a demo, and in ``runs`` what ``d2scale reproduce`` writes.
    The runs of an earlier demo are removed.

    Raises:
        ConfigError: if the folder holds other files, another demo is writing to it, or it
            cannot be written.
    """
    folder = Path(output_dir)
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / _MARKER).exists():
            raise _folder_error(folder, "it holds other files")
        make_folder(folder, key=_OPTION)
        (folder / _MARKER).touch()
    except OSError as error:
        raise _folder_error(folder, reason_of(error)) from error
    with run_lock(folder, key=_OPTION):
        _remove_runs(folder / _RUNS)
        yield _plan_of_the_recipe()
        yield ""
        yield from reproduce(replace(OPTIONS, output_dir=str(folder / _RUNS)))


def _remove_runs(runs: Path) -> None:
    # A training may go on for a moment after the demo that started it was killed.
    for lock in runs.rglob(LOCK_FILE):
        refuse_locked(lock.parent, key=_OPTION)
    try:
        if runs.exists():
            shutil.rmtree(runs)
    except OSError as error:
        raise _folder_error(runs, reason_of(error)) from error


def _folder_error(folder: Path, reason: str) -> ConfigError:
    return ConfigError([folder_fault(folder, reason, key=_OPTION, allowed="a new or empty folder")])


def _plan_of_the_recipe() -> str:
    """Return what the 64-GPU recipe becomes here, by d2go's rule and by d2scale's."""
    import torch

    gpus = max(1, torch.cuda.device_count())
    cfg, _ = load_recipe(RECIPE)
    per_gpu = make_plan(cfg, Hardware(gpus), method="per_gpu")
    keep_total = make_plan(cfg, Hardware(gpus, ims_per_gpu=8), method="keep_total")
    return (
        "\nThe 64-GPU recipe as d2go scales it: the images per GPU stay, the steps explode.\n\n"
        f"{plan_table(per_gpu)}\n"
        "\nThe same recipe with its total batch kept, eight images at a time.\n\n"
        f"{plan_table(keep_total)}"
    )
