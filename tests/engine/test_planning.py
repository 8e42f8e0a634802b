from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import pytest
import torch

import training_processes
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine import planning
from d2scale.engine.planning import check_plan, plan_on_ranks
from d2scale.errors import ConfigError, DataError
from d2scale.launch.launch import Topology, launch
from d2scale.planning.memory_profile import GIB, MemoryProfile, Phase
from landscapes import landscapes
from planning_functions import plans_for_devices_of
from warm_processes import Python, run_python

MEASURED = MemoryProfile((Phase("backward", GIB, GIB),), "measured")


@pytest.fixture(autouse=True)
def _training_set(monkeypatch):
    monkeypatch.setattr(planning, "load_training_dataset", lambda cfg: landscapes())


@pytest.fixture
def measured(monkeypatch):
    """The configs that were measured."""
    configs = []

    def measure(cfg):
        configs.append(cfg)
        return MEASURED

    monkeypatch.setattr(planning, "measure_on_ranks", measure)
    return configs


def config(recipes, *opts, budget="0.25"):
    sizes = ("INPUT.MIN_SIZE_TRAIN", "(96,)", "D2SCALE.MEMORY.BUDGET_GIB", budget)
    return load_cfg(str(recipes / "small-cpu.yaml"), [*sizes, *opts])


def test_without_a_gpu_the_recipe_is_predicted_on_its_own_dataset(recipes, measured, caplog):
    plan = plan_on_ranks(config(recipes, budget="1"), "max_memory", images=4000)
    assert plan.ims_per_gpu > 1
    assert any("as predicted" in note for note in plan.notes)
    assert not measured


@pytest.mark.parametrize("method", ["keep_total", "per_gpu", None])
def test_other_methods_need_no_profile(recipes, measured, method):
    plan = plan_on_ranks(config(recipes, "MODEL.DEVICE", "cpu"), method, images=40)
    assert plan.predicted_peak_gib is None
    assert not measured


def test_the_users_choice_of_images_needs_no_profile(recipes, measured):
    plan = plan_on_ranks(config(recipes, "D2SCALE.IMS_PER_GPU", "3"), "max_memory", images=40)
    assert (plan.ims_per_gpu, plan.predicted_peak_gib) == (3, None)
    assert not measured


def test_a_batch_of_more_images_than_there_are_is_refused(recipes):
    with pytest.raises(DataError, match="at least the 3 images of the chosen total batch"):
        plan_on_ranks(config(recipes, "D2SCALE.IMS_PER_GPU", "3"), "max_memory", images=2)


@pytest.fixture
def a_gpu(monkeypatch):
    properties = SimpleNamespace(total_memory=16 * GIB, major=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_on_a_gpu_it_is_measured(recipes, a_gpu, measured):
    cfg = config(recipes, "MODEL.DEVICE", "cuda", budget="0")
    assert plan_on_ranks(cfg, "max_memory", images=40).ims_per_gpu == 15
    assert measured == [cfg]


def test_on_a_gpu_it_is_predicted_if_it_is_not_to_be_measured(recipes, a_gpu, measured):
    cfg = config(recipes, "MODEL.DEVICE", "cuda", "D2SCALE.MEMORY.PROBE", "False", budget="1")
    assert any(
        "as predicted" in note for note in plan_on_ranks(cfg, "max_memory", images=4000).notes
    )
    assert not measured


def test_a_budget_beyond_the_gpu_is_refused_before_anything_is_measured(recipes, a_gpu, measured):
    cfg = config(recipes, "MODEL.DEVICE", "cuda", budget="17")
    for check in (lambda: check_plan(cfg, 1, "max_memory"), lambda: plan_on_ranks(cfg, None, 40)):
        with pytest.raises(ConfigError, match=r"at most the 16\.00 GiB of the device"):
            check()
    assert not measured


def test_checking_a_plan_neither_measures_nor_predicts(recipes, a_gpu, measured, monkeypatch):
    monkeypatch.setattr(planning, "predict_profile", None)
    check_plan(config(recipes, "MODEL.DEVICE", "cuda", budget="0"), 2, "max_memory")
    check_plan(config(recipes), 2, "max_memory")
    assert not measured


def test_ranks_of_different_devices_have_one_plan_or_one_fault(recipes):
    """A rank of 2 GiB and one of 1 GiB would choose different sizes for themselves."""
    cfg = config(recipes, "MODEL.DEVICE", "cuda", "D2SCALE.MEMORY.PROBE", "False", budget="0")
    cases = [(2, 1), (2, 2), (1, 1), (2, 0.01)]
    mixed, large, small, tiny = launch(plans_for_devices_of, [cfg, cases], Topology(2))
    assert mixed[0] == mixed[1] == small[0]
    assert large[0].ims_per_gpu > small[0].ims_per_gpu
    assert tiny[0] == tiny[1]
    assert "GiB are missing" in tiny[0]


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_shapes_dataset(tmp_path, 12, 1, image_size=(64, 96))
    (tmp_path / "recipe.yaml").write_text(training_processes.RECIPE)
    return tmp_path


def command(folder, *arguments, launcher=()):
    return [
        *(*launcher, training_processes.__file__, "train"),
        *("--config-file", str(folder / "recipe.yaml"), *arguments),
    ]


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def on_two_machines(folder, *options):
    """Start a run on two machines, each with options of its own, and return their ends."""
    url = f"tcp://localhost:{free_port()}"
    machines = [
        Python(
            command(
                folder,
                *("--num-machines", "2", "--machine-rank", str(number), "--dist-url", url),
                *mine,
                *("OUTPUT_DIR", str(folder / f"run{number}")),
            )
        )
        for number, mine in enumerate(options)
    ]
    try:
        ends = [machine.end() for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    return [(end.returncode, end.stderr) for end in ends]


@pytest.mark.parametrize(
    ("first", "second", "lines"),
    [
        (
            ("SOLVER.IMS_PER_BATCH", "8"),
            ("--method", "per_gpu", "SOLVER.IMS_PER_BATCH", "4"),
            (
                "--method on rank 1 is 'per_gpu'; allowed: None, as on rank 0; ",
                "SOLVER.IMS_PER_BATCH on rank 1 is 4; allowed: 8, as on rank 0; ",
            ),
        ),
        (
            ("--num-gpus", "2"),
            (),
            ("--num-gpus on machine 1 is 1; allowed: 2, as on machine 0; ",),
        ),
    ],
)
def test_machines_with_different_runs_end_with_a_line_for_each(shapes, first, second, lines):
    for status, err in on_two_machines(shapes, first, second):
        assert status == 2, err
        errors = [line for line in err.splitlines() if "error" in line]
        assert len(errors) == len(lines)
        for error, line in zip(errors, lines, strict=True):
            assert error.startswith(f"d2scale: error: {line}")
    assert not list(shapes.glob("run*"))


def test_machines_may_have_folders_of_their_own(shapes):
    short = ("SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()")
    for status, err in on_two_machines(shapes, short, (*short, "DATALOADER.NUM_WORKERS", "1")):
        assert status == 0, err
    assert (shapes / "run0" / "plan.json").exists()
    assert {path.name for path in (shapes / "run1").iterdir()} == {"log.txt.rank1"}


def test_max_memory_measures_and_trains_in_one_process_group_under_torchrun(shapes):
    """A second group in torchrun's processes would find the addresses of the first."""
    torchrun = (
        *("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "localhost:0", "--local-addr", "localhost"),
    )
    # The simulated device has room for a few images; rank 0 always comes late.
    options = ("D2SCALE.MEMORY.BUDGET_GIB", "0.6", "D2SCALE.MAX_IMS_PER_BATCH", "8")
    words = [
        *command(shapes, "--method", "max_memory", *options, launcher=torchrun),
        *("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "OUTPUT_DIR", str(shapes / "run")),
    ]
    done = run_python(words, MEASURE_ON_CPU="1", LATE_RANK="0")
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads((shapes / "run" / "plan.json").read_text())
    assert plan["world_size"] == 2
    assert any("as measured" in note for note in plan["notes"])
