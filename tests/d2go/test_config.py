import subprocess
import sys

import pytest


@pytest.fixture
def cfg():
    from d2scale.d2go.runner import Runner

    return Runner.get_default_cfg()


def test_both_sets_of_fcos_keys_are_there(cfg):
    assert {"NUM_CONVS", "HEAD_NORM", "NUM_CLS_CONVS", "NORM", "INFERENCE_TH_TEST"} <= set(
        cfg.MODEL.FCOS
    )


def test_a_shipped_base_opens(cfg, write_config):
    cfg.merge_from_file(write_config("_BASE_: [d2scale://max_memory.yaml]\n"))
    assert list(cfg.SOLVER.AUTO_SCALING_METHODS) == ["d2scale_max_memory"]


def test_a_shipped_config_file_opens(cfg):
    cfg.merge_from_file("d2scale://MetaFCOS/experiment-1-baseline.yaml")
    assert cfg.SOLVER.MAX_ITER == 30000


def test_detectron2s_own_retinanet_opens_with_its_python_tags(cfg):
    cfg.merge_from_file("detectron2://COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0][0] == 32


def test_the_environment_module_serves_the_prefix_to_detectron2():
    from detectron2.utils.file_io import PathManager

    from d2scale.d2go.environment import setup_environment

    setup_environment()
    with PathManager.open("d2scale://keep_total.yaml") as file:
        assert "d2scale_keep_total" in file.read()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER: !!python/object/apply:os.getcwd []\n", "values of the keys' types"),
        ("SEED: !!python/object/apply:eval ['1 / 0']\n", "ZeroDivisionError"),
        ("SOLVER: {BASE_LRR: 1}\n", "did you mean SOLVER.BASE_LR?"),
        ("_BASE_: recipe.yaml\n", "a chain that ends"),
    ],
)
def test_mistakes_end_the_process_with_one_line_and_status_2(
    cfg, write_config, capsys, text, message
):
    with pytest.raises(SystemExit) as raised:
        cfg.merge_from_file(write_config(text))
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("d2scale: error: ")
    assert message in line


def test_mistaken_overrides_end_the_process_too(cfg, capsys):
    with pytest.raises(SystemExit):
        cfg.merge_from_list(["SOLVER.MAX_ITERS", "5"])
    assert "did you mean SOLVER.MAX_ITER?" in capsys.readouterr().err


def test_a_faulty_schedule_is_told_before_processes_are_launched(cfg, capsys):
    from d2scale.d2go.runner import Runner

    cfg.SOLVER.AUTO_SCALING_METHODS = ["d2scale_keep_total"]
    cfg.SOLVER.STEPS = (50, 50)
    cfg.SOLVER.BASE_LR = -1.0
    with pytest.raises(SystemExit) as raised:
        Runner.create_shared_context(cfg)
    assert raised.value.code == 2
    keys = [line.split()[2] for line in capsys.readouterr().err.splitlines()]
    assert sorted(keys) == ["DATASETS.TRAIN", "SOLVER.BASE_LR", "SOLVER.STEPS"]


def test_the_runner_imports_neither_the_default_engine_nor_reports():
    command = [sys.executable, "-c", "import sys, d2scale; d2scale.Runner; print(*sys.modules)"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    modules = done.stdout.split()
    assert "d2scale.d2go.runner" in modules, done.stderr
    others = ("d2scale.engine", "d2scale.report", "d2scale.benchmark")
    assert [name for name in modules if name.startswith(others)] == []
