"""``d2scale demo``: from the 64-GPU recipe to three trained detectors on the machine at hand."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from d2scale.config import load_recipe
from d2scale.errors import ConfigError, Fault
from d2scale.planning.formats import to_table
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan
from meta_fcos.reproduction.reproduction import reproduce
from meta_fcos.reproduction.request import Request

RECIPE = "d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml"
# A little shorter than small-cpu, so that it ends within five minutes on two cores.
REQUEST = Request("demo", form="small", images_seen=2000)
# A folder with this file was made by the demo, which may make it anew.
_MARKER = "made-by-d2scale-demo"
_RUNS = "runs"


def run_demo(output_dir: str) -> Iterator[str]:
    """Plan, train, compare and report, yielding what a reader should see as it becomes known.

    Args:
        output_dir: gets the marker of a demo, and in ``runs`` what ``d2scale reproduce`` writes.
            What an earlier demo left there is made anew.

    Raises:
        ConfigError: if the folder holds something else, or cannot be written.
    """
    folder = Path(output_dir)
    _claim(folder)
    yield _plan_of_the_recipe()
    yield ""
    yield from reproduce(replace(REQUEST, output_dir=str(folder / _RUNS)))


def _claim(folder: Path) -> None:
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / _MARKER).exists():
            raise _folder_fault(folder, "it holds other files")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARKER).touch()
        with suppress(FileNotFoundError):
            shutil.rmtree(folder / _RUNS)
    except OSError as error:
        raise _folder_fault(folder, f"{error.strerror}") from error


def _folder_fault(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        [Fault("--output-dir", str(folder), "a new or empty folder", f"choose one ({reason})")]
    )


def _plan_of_the_recipe() -> str:
    """Show what the 64-GPU recipe becomes here, by d2go's rule and by d2scale's."""
    import torch

    gpus = max(1, torch.cuda.device_count())
    cfg, _ = load_recipe(RECIPE)
    plans = [
        (
            "The 64-GPU recipe as d2go scales it: the images per GPU stay, the steps explode.",
            make_plan(cfg, Hardware(gpus), method="per_gpu"),
        ),
        (
            "The same recipe with its total batch kept, eight images at a time.",
            make_plan(cfg, Hardware(gpus, ims_per_gpu=8), method="keep_total"),
        ),
    ]
    return "\n".join(f"\n{title}\n\n{to_table(plan)}" for title, plan in plans)
