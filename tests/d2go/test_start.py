"""``d2scale train --engine d2go`` starts d2go's command, without an environment variable."""

import json
import subprocess
import sys

import pytest

from d2go_commands import D2SCALE_TRAIN, RETINANET, environment, errors

pytestmark = pytest.mark.timeout(600)

SMALL = """
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [96], MAX_SIZE_TRAIN: 128, MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 128}
SOLVER: {REFERENCE_WORLD_SIZE: 2, IMS_PER_BATCH: 4, MAX_ITER: 2, STEPS: [], WARMUP_ITERS: 1}
TEST: {FINAL_EVAL: False}
"""
PLAIN = RETINANET.replace("_BASE_: [d2scale://keep_total.yaml]", "") + SMALL
D2GO_RUNNER = "d2go.runner.GeneralizedRCNNRunner"


@pytest.fixture
def start(d2go):
    def run(config, *arguments, **options):
        options = {"DETECTRON2_ENV_MODULE": "", **options}
        return d2go(config, *arguments, name=D2SCALE_TRAIN, **options)

    return run


def run_python(words, folder, datasets):
    done = subprocess.run(
        [sys.executable, *words],
        env=environment(datasets, DETECTRON2_ENV_MODULE=""),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def plan_in(folder):
    return json.loads((folder / "plan.json").read_text())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_shipped_base_trains(start, tmp_path, processes):
    start(RETINANET + SMALL, processes=processes)
    assert (tmp_path / "out" / "model_final.pth").exists()
    assert plan_in(tmp_path / "out")["world_size"] == processes


def test_a_shipped_config_file_trains(tmp_path, datasets):
    words = (
        *("train", "--engine", "d2go", "--config-file", "d2scale://MetaFCOS/small-cpu.yaml"),
        *("--output-dir", "out", "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "MODEL.WEIGHTS", ""),
        *("TEST.FINAL_EVAL", "False", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    )
    run_python(["-m", "d2scale.cli", *words], tmp_path, datasets)
    assert (tmp_path / "out" / "model_final.pth").exists()


@pytest.mark.parametrize(
    ("options", "method", "ims_per_batch"),
    [((), "keep_total", 4), (("--method", "per_gpu"), "per_gpu", 2)],
)
def test_the_method_is_that_of_d2scale_train(start, tmp_path, options, method, ims_per_batch):
    start(PLAIN, *options)
    plan = plan_in(tmp_path / "out")
    assert (plan["method"], plan["ims_per_batch"]) == (method, ims_per_batch)


def test_trains_on_the_ranks_of_torchrun(tmp_path, datasets):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RETINANET + SMALL)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    words = ("train", "--engine", "d2go", "--config-file", str(recipe), "--output-dir", "out")
    run_python([*launcher, "-m", "d2scale.cli", *words], tmp_path, datasets)
    assert plan_in(tmp_path / "out")["world_size"] == 2


def test_a_users_own_environment_module_is_called_too(start, tmp_path):
    module = tmp_path / "mine.py"
    module.write_text(f"def setup_environment():\n    open({str(tmp_path / 'called')!r}, 'w')\n")
    start(PLAIN, "SOLVER.BASE_LRR", "1", status=2, DETECTRON2_ENV_MODULE=module)
    assert (tmp_path / "called").exists()


def test_shipped_bases_open_under_d2gos_own_runner(write_config, monkeypatch):
    from d2go.config import CfgNode, utils

    from d2scale.d2go.start import import_d2go

    monkeypatch.setattr(utils, "reroute_fb_config_path", utils.reroute_fb_config_path)
    monkeypatch.setenv("DETECTRON2_ENV_MODULE", "")
    import_d2go()
    content = CfgNode.load_yaml_with_base(write_config("_BASE_: d2scale://per_gpu.yaml\n"))
    assert content["SOLVER"]["AUTO_SCALING_METHODS"] == ["d2scale_per_gpu"]


def test_d2gos_own_runner_trains_what_it_knows(start, tmp_path):
    output = start(PLAIN, runner=D2GO_RUNNER)
    assert "Applying auto scaling method: default_scale_d2_configs" in output
    assert not (tmp_path / "out" / "plan.json").exists()


@pytest.mark.parametrize(
    ("config", "options", "key"),
    [
        (RETINANET + SMALL, (), "SOLVER.AUTO_SCALING_METHODS"),
        (PLAIN + "D2SCALE: {EXACT: True}\n", (), "D2SCALE.EXACT"),
        (PLAIN, ("--method", "keep_total"), "SOLVER.AUTO_SCALING_METHODS"),
    ],
)
def test_d2gos_own_runner_cannot_follow_d2scale(start, tmp_path, config, options, key):
    output = start(config, *options, runner=D2GO_RUNNER, status=2)
    (line,) = errors(output)
    assert f"d2scale.Runner or a class derived from it, with {key} in the recipe" in line
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "all"), "allowed: one of d2scale_per_gpu"),
        (("--num-machines", "2"), "--dist-url is 'auto'; allowed: tcp://HOST:PORT"),
        (("SOLVER.BASE_LRR", "1"), "did you mean SOLVER.BASE_LR?"),
    ],
)
def test_a_mistake_is_one_line(start, tmp_path, options, message):
    output = start(PLAIN, *options, status=2)
    (line,) = errors(output)
    assert message in line
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_a_mistake_that_the_ranks_find_is_one_line(start):
    output = start(PLAIN, "MODEL.RESNETS.DEPTH", "19", processes=2, status=2)
    (line,) = errors(output)
    assert "MODEL.META_ARCHITECTURE is 'RetinaNet'; allowed: what can be built" in line
    assert "KeyError: 19, in " in line
    assert "Traceback" not in output
