"""A run of the default engine: everything checked, a folder made, ranks launched."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from d2scale.coco.dataset import check_datasets
from d2scale.engine.checkpoint.weights import find_weights
from d2scale.engine.data.transforms import input_faults
from d2scale.engine.honoured import value_faults
from d2scale.engine.launch import (
    RESTARTS,
    address_faults,
    launch,
    planned_world_size,
    under_torchrun,
)
from d2scale.engine.memory.filling import hardware_for_training
from d2scale.engine.memory.measure import measure_profile
from d2scale.engine.models import check_model
from d2scale.engine.worker import Job, Results, run_rank
from d2scale.errors import ConfigError, Fault
from d2scale.planning.memory_profile import MemoryProfile
from d2scale.planning.plan import Plan, make_plan, refuse_more_than_all
from d2scale.planning.progress import recipe_of
from d2scale.run_folder.contents import holds_run
from d2scale.run_folder.files import folder_faults, make_folder
from d2scale.run_folder.lock import refuse_locked

logger = logging.getLogger(__name__)


def train(
    cfg: CfgNode,
    *,
    num_processes: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    resume: bool = False,
    eval_only: bool = False,
    method: str | None = None,
) -> Results:
    """Train a recipe, or evaluate its weights, in the folder ``cfg.OUTPUT_DIR``.

    Everything is checked before anything is written: the config, the plan, the weights, the
    datasets, the folder. The ranks log, and once the checkpoint to resume from has turned out
    to fit they write ``config.yaml``, the config as planned, ``plan.json``, metrics,
    checkpoints and ``inference/``.

    Args:
        cfg: the recipe, as ``d2scale.config.load_cfg`` reads it; it is not changed.
        num_processes: ranks on this machine, one to a GPU. Under torchrun its ranks are used.
        num_machines, machine_rank, dist_url: see :func:`d2scale.engine.launch.launch`.
        resume: go on from the last checkpoint in the folder, if there is one; on another world
            size or by another method too. Done without asking when torchrun restarts the ranks.
        eval_only: evaluate ``MODEL.WEIGHTS`` (with ``resume`` the last checkpoint) and stop.
        method: ``per_gpu``, ``keep_total`` or ``max_memory``; None: what the recipe says.

    Returns:
        The metrics of the last evaluation, ``bbox/AP`` and so on, in percent; empty without
        ``DATASETS.TEST``, and under torchrun on all ranks but the first.

    Raises:
        ConfigError: with every fault of the config, its datasets and its weights.
        D2ScaleError: for what goes wrong later and the user can mend.
        KeyboardInterrupt: Ctrl-C, after all ranks have ended.
    """
    resume = resume or int(os.environ.get(RESTARTS, "0")) > 0
    cfg, notes = _for_this_machine(cfg)
    plan = _check(
        cfg,
        processes=[
            *_process_faults(cfg, num_processes, num_machines),
            *address_faults(num_machines, machine_rank, dist_url),
        ],
        world_size=planned_world_size(num_processes, num_machines),
        resume=resume,
        eval_only=eval_only,
        method=method,
        measure=partial(
            measure_profile,
            cfg,
            num_processes=num_processes,
            num_machines=num_machines,
            machine_rank=machine_rank,
            dist_url=dist_url,
        ),
    )
    job = Job(_planned(cfg, plan), recipe_of(cfg), plan, resume, notes)
    make_folder(Path(cfg.OUTPUT_DIR))
    results: Results = launch(
        run_rank,
        [job],
        num_processes=num_processes,
        num_machines=num_machines,
        machine_rank=machine_rank,
        dist_url=dist_url,
        use_cuda=cfg.MODEL.DEVICE == "cuda",
    )
    return results


def _for_this_machine(cfg: CfgNode) -> tuple[CfgNode, tuple[str, ...]]:
    """Fall back to what there is: a CPU for CUDA, and bfloat16 for float16, which needs CUDA."""
    cfg = cfg.clone()
    cfg.defrost()
    notes = []
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        notes.append("MODEL.DEVICE is cuda, but CUDA is not available: running on the CPU")
    amp = cfg.SOLVER.AMP
    if amp.ENABLED and amp.PRECISION == "float16" and cfg.MODEL.DEVICE == "cpu":
        amp.PRECISION = "bfloat16"
        notes.append("SOLVER.AMP.PRECISION is float16, which needs CUDA: using bfloat16")
    return cfg, tuple(notes)


def _check(
    cfg: CfgNode,
    *,
    processes: list[Fault],
    world_size: int,
    resume: bool,
    eval_only: bool,
    method: str | None,
    measure: Callable[[], MemoryProfile],
) -> Plan | None:
    """Return the plan, or raise every fault there is. Writes nothing."""
    faults = [*value_faults(cfg), *input_faults(cfg), *processes]
    plan: Plan | None = None
    images = 0

    def make() -> None:
        nonlocal plan
        hardware = hardware_for_training(
            cfg, world_size, method=method, measure=None if faults else measure
        )
        plan = make_plan(cfg, hardware, method=method)
        refuse_more_than_all(plan, images)

    def read_datasets() -> None:
        nonlocal images
        images = check_datasets(cfg, eval_only=eval_only)

    checks: list[Callable[[], object]] = [partial(check_model, cfg)]
    checks.append(partial(_check_folder, cfg.OUTPUT_DIR, may_hold_run=resume or eval_only))
    # Under torchrun a sister rank may hold the lock already: the first rank itself takes it.
    if not eval_only and not under_torchrun():
        checks.append(partial(refuse_locked, Path(cfg.OUTPUT_DIR)))
    if not (resume and holds_run(Path(cfg.OUTPUT_DIR))):
        checks.append(partial(_check_weights, cfg, eval_only))
    checks.append(read_datasets)
    # A broken number of processes would only lead to more faults. Last, for it may measure.
    if not eval_only and not processes:
        checks.append(make)
    for check in checks:
        try:
            check()
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    return plan


def _process_faults(cfg: CfgNode, num_processes: int, num_machines: int) -> list[Fault]:
    if under_torchrun():
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    faults = []
    for option, value in (("--num-gpus", num_processes), ("--num-machines", num_machines)):
        if value < 1:
            faults.append(Fault(option, value, "1 or more", "correct it"))
    gpus = torch.cuda.device_count() if cfg.MODEL.DEVICE == "cuda" else None
    if gpus is not None and num_processes > gpus:
        advice = "use fewer, or set MODEL.DEVICE to cpu"
        allowed = f"at most {gpus}, the GPUs of this machine"
        faults.append(Fault("--num-gpus", num_processes, allowed, advice))
    return faults


def _check_weights(cfg: CfgNode, eval_only: bool) -> None:
    if cfg.MODEL.WEIGHTS:
        find_weights(cfg.MODEL.WEIGHTS)
    elif eval_only:
        advice = "name them, or use --resume for the last checkpoint"
        raise ConfigError([Fault("MODEL.WEIGHTS", "", "weights to evaluate", advice)])


def _check_folder(name: str, *, may_hold_run: bool) -> None:
    folder = Path(name)
    if not may_hold_run and holds_run(folder):
        raise ConfigError(
            [
                Fault(
                    "OUTPUT_DIR",
                    name,
                    "a folder without the checkpoints of another run",
                    "add --resume to go on with that run, or choose another folder",
                )
            ]
        )
    if faults := folder_faults(folder):
        raise ConfigError(faults)


def _planned(cfg: CfgNode, plan: Plan | None) -> CfgNode:
    if plan is None:
        return cfg
    planned = plan.apply(cfg)
    # So that the written config runs as it is, and is not scaled a second time.
    planned.SOLVER.AUTO_SCALING_METHODS = ()
    planned.D2SCALE.IMS_PER_GPU = plan.ims_per_gpu
    planned.D2SCALE.ACCUMULATION_STEPS = 0
    return planned
