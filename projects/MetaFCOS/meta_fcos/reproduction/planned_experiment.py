"""One experiment on this machine: its recipe, its plan, and how far its training has come."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from d2scale.engine.config import load_cfg
from d2scale.errors import ConfigError, Fault
from d2scale.planning.hardware import Hardware
from d2scale.planning.memory_profile import GIB
from d2scale.planning.plan import Plan, make_plan
from d2scale.planning.progress import Progress, recipe_changes, recipe_of
from d2scale.run_folder.contents import last_checkpoint, read_json
from d2scale.run_folder.files import CONFIG_FILE, FINAL_CHECKPOINT, METRICS_FILE, PLAN_FILE
from meta_fcos.reproduction.experiments import Experiment, length_settings

# One order of images for all experiments; 1 and 2 then take the same steps.
_SEED = 1


@dataclass(frozen=True)
class Machine:
    """What the experiments run on."""

    device: str  # cuda or cpu
    ranks: int  # of the experiments that are written for two GPUs, one to a GPU
    name: str
    gib: float | None = None  # memory of one GPU, None for a CPU

    @classmethod
    def at_hand(cls, form: str, num_gpus: int | None) -> Machine:
        """Return this machine, with ``num_gpus`` ranks or at most the publication's two.

        The small form runs on a CPU. ConfigError for more ranks than GPUs, or a CPU's cores.
        """
        gpus = torch.cuda.device_count() if form == "full" else 0
        most = gpus or max(2, os.cpu_count() or 1)
        if num_gpus is not None and not 1 <= num_gpus <= most:
            what = "GPUs of this machine" if gpus else "processes that its cores can hold"
            advice = "use fewer" if num_gpus > most else "use one at least"
            raise ConfigError([Fault("--num-gpus", num_gpus, f"1 to {most}, the {what}", advice)])
        if not gpus:
            ranks = num_gpus or (1 if form == "full" else 2)
            return cls("cpu", ranks, f"CPU with {os.cpu_count()} cores")
        device = torch.cuda.get_device_properties(0)
        return cls("cuda", num_gpus or min(2, gpus), device.name, device.total_memory / GIB)

    @property
    def unit(self) -> str:
        """What one rank runs on."""
        return "GPU" if self.device == "cuda" else "process"


@dataclass(frozen=True)
class PlannedExperiment:
    """One experiment as it runs on this machine."""

    experiment: Experiment
    recipe: str  # its address
    settings: Mapping[str, Any]  # what is set beyond the recipe, by config key
    cfg: Any  # recipe and settings
    plan: Plan
    machine: Machine

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.cfg.OUTPUT_DIR)

    @property
    def arguments(self) -> list[str]:
        """What follows ``d2scale`` on the command line that starts or resumes it."""
        ranks = ["--num-gpus", str(self.plan.world_size)]
        options = ["--config-file", self.recipe, *ranks, "--method", self.plan.method, "--resume"]
        return ["train", *options, *(str(part) for pair in self.settings.items() for part in pair)]

    @property
    def on_fewer_gpus(self) -> bool:
        """Whether fewer GPUs than it is written for take its steps in more micro-batches."""
        return self.plan.world_size < self.experiment.gpus


def plan_experiment(
    experiment: Experiment, recipe: str, folder: Path, machine: Machine, images_seen: int | None
) -> PlannedExperiment:
    """Plan an experiment for the machine."""
    cfg = load_cfg(recipe)
    settings: dict[str, Any] = {
        "OUTPUT_DIR": str(folder / experiment.folder),
        "MODEL.DEVICE": machine.device,
        "SEED": _SEED,
        "D2SCALE.EXACT": True,
        **length_settings(cfg, images_seen),
    }

    def planned() -> PlannedExperiment:
        changed = cfg.clone()
        changed.merge_from_list([part for pair in settings.items() for part in pair])
        ranks = 1 if experiment.gpus == 1 else machine.ranks
        hardware = Hardware.from_cfg(changed, ranks, device_gib=machine.gib)
        if machine.gib is None:
            # The profiles are of GPUs.
            hardware = replace(hardware, profile=None, variants=())
        plan = make_plan(changed, hardware)
        return PlannedExperiment(experiment, recipe, dict(settings), changed, plan, machine)

    here = planned()
    if here.on_fewer_gpus and (same_steps := _settings_for_same_steps(here)):
        settings |= same_steps
        here = planned()
    return here


def _settings_for_same_steps(planned: PlannedExperiment) -> dict[str, int]:
    """Return what lets fewer GPUs than an experiment is written for take the same steps.

    They run in micro-batches no larger than one of those GPUs had, and so with the same result:
    D2SCALE.EXACT.
    """
    gpus, plan = planned.experiment.gpus, planned.plan
    if plan.method == "max_memory":  # it fills every GPU as one of those was
        return {"D2SCALE.ACCUMULATION_STEPS": -(-gpus // plan.world_size)}
    ims_per_gpu = -(-planned.cfg.SOLVER.IMS_PER_BATCH // gpus)
    return {"D2SCALE.IMS_PER_GPU": ims_per_gpu} if plan.ims_per_gpu > ims_per_gpu else {}


def is_finished(folder: Path) -> bool:
    """Return whether the run in ``folder`` has been trained to its end, and evaluated."""
    try:
        rows = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        # The evaluation that ends a run is the last thing that it writes.
        evaluated = bool(rows) and "bbox/AP" in json.loads(rows[-1])
    except (OSError, ValueError):
        return False
    final = folder / FINAL_CHECKPOINT
    return evaluated and last_checkpoint(folder) == final and final.is_file()


def standing(folder: Path) -> str:
    """Return how far the run in ``folder`` has come, in words."""
    if is_finished(folder):
        return "finished"
    last = last_checkpoint(folder)
    return "from the start" if last is None else f"goes on from {last.name}"


def recipe_faults(planned: PlannedExperiment) -> list[Fault]:
    """Return the keys in which the run in the experiment's folder was begun otherwise."""
    try:
        changes = read_json(planned.folder / PLAN_FILE)["changes"]
        begun = load_cfg(str(planned.folder / CONFIG_FILE))
    except (ConfigError, KeyError):
        return []  # It ended before its first step.
    recipe = recipe_of(begun, changes)
    stopped = Progress(iteration=0, images_seen=0, recipe=recipe, plan={})
    title = planned.experiment.title
    advice = "go on with the version that began it, or choose another --output-dir"
    return [
        Fault(f"{key} of experiment {title}", new, f"{old!r}, as in {planned.folder}", advice)
        for key, (old, new) in recipe_changes(stopped, recipe_of(planned.cfg)).items()
    ]
