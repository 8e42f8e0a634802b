"""detectron2's LazyConfigs plan, scale and tell mistakes by their own names."""

import builtins

import pytest

from d2scale import cli
from d2scale.errors import ConfigError
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan

MASK_RCNN = "detectron2://COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py"
SMALL = """\
dataloader = dict(train=dict(total_batch_size=8))
optimizer = dict(lr=0.04)
train = dict(max_iter=100, eval_period=10)
"""


def read(path, *overrides):
    from d2scale.detectron2.lazy_config import load_lazy_config, read_lazy_recipe

    return read_lazy_recipe(load_lazy_config(path, overrides))


def message_of(path, *overrides):
    with pytest.raises(ConfigError) as raised:
        read(path, *overrides)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_zoo_config_means_what_its_yaml_twin_means():
    recipe, settings = read(MASK_RCNN)
    solver = recipe.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (16, 0.02, 90000)
    assert (solver.STEPS, solver.WARMUP_ITERS) == ((60000, 80000), 1000)
    assert (solver.CHECKPOINT_PERIOD, recipe.TEST.EVAL_PERIOD) == (5000, 5000)
    assert (solver.OPTIMIZER, solver.MOMENTUM) == ("sgd", 0.9)
    assert settings["model.backbone.bottom_up.freeze_at"] == 2
    assert settings["model._target_"].endswith("GeneralizedRCNN")
    assert make_plan(recipe, Hardware(1)).changes == {"SOLVER.REFERENCE_WORLD_SIZE": (8, 1)}


def test_a_plan_is_applied_to_a_copy_and_the_schedule_stays_the_same():
    from detectron2.config import instantiate

    from d2scale.detectron2.lazy_config import apply_plan, load_lazy_config, read_lazy_recipe

    cfg = load_lazy_config(MASK_RCNN, ["train.max_iter=9000"])
    recipe, _ = read_lazy_recipe(cfg)
    plan = make_plan(recipe, Hardware(1), method="per_gpu")
    planned = apply_plan(cfg, plan)
    assert (cfg.dataloader.train.total_batch_size, cfg.train.max_iter) == (16, 9000)
    assert planned.dataloader.train.total_batch_size == 2
    assert planned.optimizer.lr == 0.0025
    assert planned.train.max_iter == 72000
    assert planned.train.checkpointer.period == 40000
    assert planned.d2scale.reference_world_size == 1
    # Again the recipe of a plan is a recipe: of the same rates at the same parts.
    again, _ = read_lazy_recipe(planned)
    assert again.SOLVER.STEPS == (48000, 64000)
    assert again.SOLVER.WARMUP_ITERS == 800
    old, new = instantiate(cfg.lr_multiplier), instantiate(planned.lr_multiplier)
    assert [old(part / 50) for part in range(50)] == [new(part / 50) for part in range(50)]


def test_the_node_d2scale_holds_the_gpus_and_the_options(write_config):
    text = SMALL + "d2scale = dict(reference_world_size=4, method='per_gpu', lr_rule='sqrt',\n"
    path = write_config(text + "    memory=dict(fraction=0.5))\n", "x.py")
    recipe, _ = read(path)
    assert recipe.D2SCALE.MEMORY.FRACTION == 0.5
    plan = make_plan(recipe, Hardware(1))
    assert (plan.method, plan.lr_rule, plan.ims_per_batch) == ("per_gpu", "sqrt", 2)


def test_the_gain_rule_is_written_into_the_node(write_config):
    from d2scale.detectron2.lazy_config import apply_plan, load_lazy_config, read_lazy_recipe

    cfg = load_lazy_config(write_config(SMALL, "x.py"))
    recipe, _ = read_lazy_recipe(cfg)
    recipe.SOLVER.OPTIMIZER = "sgd"
    plan = make_plan(recipe, Hardware(2, ims_per_gpu=8), method="max_memory", lr_rule="gain")
    planned = apply_plan(cfg, plan)
    assert planned.optimizer.lr == 0.04
    assert planned.d2scale.lr_rule == "gain"
    again, _ = read_lazy_recipe(planned)
    assert again.D2SCALE.RECIPE_IMS_PER_BATCH == 8


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("total_batch_size=8", "batch=8", "dataloader.train.total_batch_size is None"),
        ("lr=0.04", "lr='fast'", "optimizer.lr is 'fast'"),
        ("max_iter=100", "max_iter='x'", "train.max_iter is 'x'"),
        ("max_iter=100", "max_iter='${nowhere}'", "train.max_iter is ''"),
        ("dataloader", "import no_such_package\ndataloader", "ModuleNotFoundError: No module"),
        ("dataloader", "raise SystemExit('over')\ndataloader", "SystemExit: over"),
        ("dataloader", "1 +\ndataloader", "SyntaxError"),
        ("dataloader", "d2scale = dict(lr_rules=1)\ndataloader", "d2scale.lr_rules is 1"),
    ],
)
def test_a_mistake_is_one_line_in_the_words_of_a_lazy_config(write_config, old, new, expected):
    before = builtins.__import__
    assert expected in message_of(write_config(SMALL.replace(old, new, 1), "x.py"))
    assert builtins.__import__ is before


def test_nodes_without_a_value_plan(write_config):
    path = write_config(SMALL, "x.py")
    nulls = [f"{node}=null" for node in ("d2scale", "model", "dataloader.train.mapper")]
    assert read(path, *nulls)[0].SOLVER.MAX_ITER == 100
    assert "d2scale is 3; allowed: dict(...)" in message_of(path, "d2scale=3")
    mapper = "\ndef mapper(sample): pass\ndataloader['train']['mapper'] = mapper\ndel mapper"
    _, settings = read(write_config(SMALL + mapper, "y.py"))
    assert settings["dataloader.train.mapper"].endswith(".mapper")


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["train", "--config-file"], ["model", "lr_multiplier", "train.amp.enabled"]),
        (["memory"], ["dataloader.train.dataset", "dataloader.train.mapper", "model"]),
    ],
)
def test_commands_name_all_nodes_that_they_need(write_config, capsys, words, needed):
    path = write_config("optimizer = dict(lr=0.04)\n", "x.py")
    assert cli.main([*words, path, "model=3"]) == 2
    lines = [line.split()[2] for line in capsys.readouterr().err.splitlines()[1:]]
    assert {"dataloader.train.total_batch_size", "train.max_iter", *needed} <= {*lines}


def test_overrides_are_detectron2s_own(write_config):
    path = write_config(SMALL, "x.py")
    assert read(path, "train.max_iter=7", "optimizer.lr=0.5")[0].SOLVER.MAX_ITER == 7
    assert "key=value" in message_of(path, "train.max_iter", "7")
    assert "FileNotFoundError" in message_of(path + ".py")


def test_the_command_shows_and_blames_the_keys_of_the_file(write_config, capsys):
    path = write_config(SMALL, "x.py")
    assert cli.main(["plan", path, "--method", "per_gpu"]) == 0
    shown = capsys.readouterr().out
    assert "| dataloader.train.total_batch_size | 8           | 1           |" in shown
    assert "SOLVER" not in shown
    assert cli.main(["plan", path, "optimizer.lr=-1", "train.max_iter=0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == ["optimizer.lr", "train.max_iter"]
    assert cli.main(["plan", path, "--format", "yaml"]) == 2
    assert "--format is 'yaml'" in capsys.readouterr().err
