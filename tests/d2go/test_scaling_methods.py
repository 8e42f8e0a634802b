import pytest

from d2scale.config import load_recipe
from d2scale.config.keys import get_key
from d2scale.errors import ConfigError
from d2scale.planning.formats import plan_yaml
from d2scale.planning.hardware import Hardware
from d2scale.planning.methods import METHODS
from d2scale.planning.plan import make_plan


@pytest.fixture
def d2go_cfg(recipes):
    """The 64-GPU recipe in the Runner's own config."""
    from d2scale.d2go.runner import Runner

    cfg = Runner.get_default_cfg()
    cfg.merge_from_file(str(recipes / "Meta-FCOS-pretrain.yaml"))
    return cfg


def scale(cfg, world_size, methods):
    from d2go.config import auto_scale_world_size

    cfg.SOLVER.AUTO_SCALING_METHODS = methods
    cfg.freeze()
    auto_scale_world_size(cfg, world_size)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_does_in_d2go_what_the_plan_says(d2go_cfg, recipes, method):
    recipe, _ = load_recipe(str(recipes / "Meta-FCOS-pretrain.yaml"))
    hardware = Hardware(2, ims_per_gpu=15)
    plan = make_plan(recipe, hardware, method=method, takes_steps=False)
    d2go_cfg.D2SCALE.IMS_PER_GPU = 15
    scale(d2go_cfg, 2, [f"d2scale_{method}"])
    assert {key: get_key(d2go_cfg, key) for key in plan.changes} == {
        key: new for key, (_, new) in plan.changes.items()
    }
    assert d2go_cfg.is_frozen()


def test_per_gpu_is_d2gos_own_rule_with_the_gaps_closed(d2go_cfg):
    from d2scale.d2go.runner import Runner

    theirs = Runner.get_default_cfg()
    theirs.merge_from_other_cfg(d2go_cfg)
    scale(theirs, 1, ["default_scale_d2_configs", "default_scale_quantization_configs"])
    scale(d2go_cfg, 1, ["d2scale_per_gpu"])
    assert d2go_cfg.SOLVER.CHECKPOINT_PERIOD == 640000
    d2go_cfg.defrost()
    d2go_cfg.SOLVER.CHECKPOINT_PERIOD = theirs.SOLVER.CHECKPOINT_PERIOD
    d2go_cfg.SOLVER.AUTO_SCALING_METHODS = theirs.SOLVER.AUTO_SCALING_METHODS
    assert d2go_cfg == theirs


@pytest.mark.parametrize(
    "methods",
    [
        ["d2scale_keep_total", "d2scale_per_gpu"],
        ["d2scale_per_gpu", "d2scale_per_gpu"],
        ["default_scale_d2_configs", "d2scale_per_gpu"],
        ["d2scale_per_gpu", "default_scale_quantization_configs"],
    ],
)
def test_two_methods_are_refused(d2go_cfg, methods, capsys):
    with pytest.raises(SystemExit, match="2"):
        scale(d2go_cfg, 2, methods)
    assert "twice" in capsys.readouterr().err


def test_a_method_applied_again_is_refused(d2go_cfg):
    from d2scale.d2go.memory import D2GoMemory
    from d2scale.detectron2.scaling import scale_in_place

    d2go_cfg.SOLVER.AUTO_SCALING_METHODS = ["d2scale_per_gpu"]
    scale_in_place(d2go_cfg, 2, "per_gpu", D2GoMemory(d2go_cfg))
    with pytest.raises(ConfigError, match="scaled already"):
        scale_in_place(d2go_cfg.clone(), 2, "per_gpu", D2GoMemory(d2go_cfg))


def test_without_the_runner_the_gain_rule_is_not_to_be_had(d2go_cfg, capsys):
    asked = d2go_cfg.clone()
    asked.D2SCALE.LR_RULE = "gain"
    with pytest.raises(SystemExit, match="2"):
        scale(asked, 2, ["d2scale_keep_total"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "D2SCALE.LR_RULE is 'gain'; allowed: auto, linear, sqrt or none" in line
    assert "or train with d2scale train or d2scale's Runner" in line


def test_without_the_runner_auto_is_linear_and_says_so(d2go_cfg, caplog):
    d2go_cfg.D2SCALE.IMS_PER_GPU = 100
    with caplog.at_level("INFO"):
        scale(d2go_cfg, 2, ["d2scale_max_memory"])
    assert "scaled linearly, which may cost quality" in caplog.text
    assert d2go_cfg.D2SCALE.LR_RULE == "auto"


def test_the_gain_rule_needs_a_method_of_d2scale(d2go_cfg):
    from d2scale.d2go.memory import D2GoMemory
    from d2scale.d2go.scaling_methods import scale_for_training

    d2go_cfg.D2SCALE.LR_RULE = "gain"
    d2go_cfg.SOLVER.AUTO_SCALING_METHODS = ["default_scale_d2_configs"]
    with pytest.raises(ConfigError, match="with d2go's own scaling methods; name a d2scale"):
        scale_for_training(d2go_cfg, D2GoMemory(d2go_cfg), resume=False, takes_steps=True)


def test_an_uneven_split_is_refused_where_the_loader_would_fail(d2go_cfg, capsys):
    with pytest.raises(SystemExit, match="2"):
        scale(d2go_cfg, 3, ["d2scale_keep_total"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "a multiple of 3 processes" in line


def test_the_yaml_form_merges_in_d2go_and_gives_the_same_values(recipes, tmp_path):
    from d2scale.d2go.runner import Runner

    path = str(recipes / "Meta-FCOS-pretrain.yaml")
    recipe, settings = load_recipe(path)
    plan = make_plan(recipe, Hardware(1), method="per_gpu")
    (tmp_path / "plan.yaml").write_text(plan_yaml(plan, path, settings, str(tmp_path)))
    cfg = Runner.get_default_cfg()
    cfg.merge_from_file(str(tmp_path / "plan.yaml"))
    assert {key: get_key(cfg, key) for key in plan.changes} == {
        key: new for key, (_, new) in plan.changes.items()
    }


@pytest.mark.parametrize("engine", ["detectron2", "d2go"])
def test_a_plain_recipe_merges_in_both_engines_without_d2scale(write_config, tmp_path, engine):
    from d2go.runner import GeneralizedRCNNRunner
    from detectron2.config import get_cfg

    path = write_config("SOLVER: {REFERENCE_WORLD_SIZE: 8, IMS_PER_BATCH: 16, BASE_LR: 0.02}\n")
    recipe, settings = load_recipe(path)
    plan = make_plan(recipe, Hardware(1), method="per_gpu")
    (tmp_path / "plan.yaml").write_text(plan_yaml(plan, path, settings, str(tmp_path)))
    cfg = get_cfg() if engine == "detectron2" else GeneralizedRCNNRunner.get_default_cfg()
    cfg.merge_from_file(str(tmp_path / "plan.yaml"))
    planned = {key: new for key, (_, new) in plan.changes.items() if "QAT" not in key}
    assert {key: get_key(cfg, key) for key in planned} == planned
