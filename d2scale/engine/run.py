"""A run of the default engine: everything cheap is checked, then the ranks are launched."""

from __future__ import annotations

from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from d2scale.coco.class_count import with_class_count
from d2scale.coco.dataset import check_datasets
from d2scale.coco.digests import DataFacts
from d2scale.config.own_datasets import make_paths_absolute
from d2scale.engine.checkpoint.weights import find_weights
from d2scale.engine.data.transforms import input_faults
from d2scale.engine.honoured import value_faults
from d2scale.engine.models import check_model, check_weights
from d2scale.engine.planning import check_plan
from d2scale.engine.worker import Job, Results, run_rank
from d2scale.errors import ConfigError, Fault, collecting
from d2scale.launch.elastic import may_start_anew, store_faults
from d2scale.launch.launch import Topology, launch, under_torchrun
from d2scale.run_folder.contents import holds_run
from d2scale.run_folder.files import folder_faults
from d2scale.run_folder.lock import refuse_locked
from d2scale.step.precision import bfloat16_faults


def train(
    cfg: CfgNode,
    topology: Topology | None = None,
    *,
    resume: bool = False,
    eval_only: bool = False,
    method: str | None = None,
) -> Results:
    """Train a recipe, or evaluate its weights, in the folder ``cfg.OUTPUT_DIR``.

    Everything is checked before anything is written: the config, the weights, the datasets, the
    folder, and then, inside the ranks, the plan and whether all of them were given the same.
    The ranks log, and once the checkpoint to resume from has turned out to fit they write
    ``config.yaml``, the config as planned, ``plan.json``, metrics, checkpoints and
    ``inference/``.

    Args:
        cfg: the recipe, as ``d2scale.config.load_cfg`` reads it; it is not changed.
        resume: go on from the last checkpoint in the folder, if there is one; on another world
            size or by another method too. Done without asking under torchrun's --max-restarts.
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
    topology = topology or Topology()
    resume = resume or (may_start_anew() and not eval_only)
    cfg, notes = for_this_machine(cfg)
    data = _check(cfg, topology, resume=resume, eval_only=eval_only, method=method)
    job = Job(cfg, method, resume, eval_only, data, notes)
    results: Results = launch(run_rank, [job], topology, use_cuda=cfg.MODEL.DEVICE == "cuda")
    return results


def for_this_machine(cfg: CfgNode) -> tuple[CfgNode, tuple[str, ...]]:
    """Fall back to what there is: a CPU for CUDA, and bfloat16 for float16, which needs CUDA."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg = with_class_count(cfg)
    make_paths_absolute(cfg)  # for who reads config.yaml in another folder
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
    cfg: CfgNode, topology: Topology, *, resume: bool, eval_only: bool, method: str | None
) -> DataFacts:
    """Return what is known of the datasets, or raise every fault there is. Writes nothing."""
    gpus = torch.cuda.device_count() if cfg.MODEL.DEVICE == "cuda" else None
    wrong_processes = [*topology.faults(gpus), *store_faults()]
    faults = [*value_faults(cfg), *input_faults(cfg), *wrong_processes, *bfloat16_faults(cfg)]
    folder = Path(cfg.OUTPUT_DIR)
    data = DataFacts()
    with collecting(faults):
        check_model(cfg)
    with collecting(faults):
        _check_folder(folder, may_hold_run=resume or eval_only)
    # Under torchrun a sister rank may hold the lock already: the first rank itself takes it.
    if not eval_only and not under_torchrun():
        with collecting(faults):
            refuse_locked(folder)
    begins = not (resume and holds_run(folder))
    if begins:
        with collecting(faults):
            _check_weights(cfg, eval_only)
    with collecting(faults):
        data = check_datasets(cfg, eval_only=eval_only)
    # A broken number of processes would only lead to more faults.
    if not eval_only and not wrong_processes:
        with collecting(faults):
            check_plan(cfg, topology.world_size, method)
    if faults:
        raise ConfigError(faults)
    if begins:
        check_weights(cfg)
    return data


def _check_weights(cfg: CfgNode, eval_only: bool) -> None:
    if cfg.MODEL.WEIGHTS:
        find_weights(cfg.MODEL.WEIGHTS)
    elif eval_only:
        advice = "name them, or use --resume for the last checkpoint"
        raise ConfigError([Fault("MODEL.WEIGHTS", "", "weights to evaluate", advice)])


def _check_folder(folder: Path, *, may_hold_run: bool) -> None:
    if not may_hold_run and holds_run(folder):
        allowed = "a folder without the checkpoints of another run"
        advice = "add --resume to go on with that run, or choose another folder"
        raise ConfigError([Fault("OUTPUT_DIR", str(folder), allowed, advice)])
    if faults := folder_faults(folder):
        raise ConfigError(faults)
