import yaml

from d2scale.config import load_recipe
from d2scale.planning.formats import plan_table, plan_yaml, table
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan


def test_the_table_has_d2go_columns_and_the_facts_above(recipes):
    cfg, _ = load_recipe(str(recipes / "Meta-FCOS-pretrain.yaml"))
    lines = plan_table(make_plan(cfg, Hardware(1), method="per_gpu")).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| config key"))
    assert [cell.strip() for cell in lines[head].strip("|").split("|")] == [
        "config key",
        "old value",
        "new value",
    ]
    assert len(lines[head + 2 :]) == 12
    assert any(line.split() == ["total", "batch:", "2"] for line in lines[:head])


def test_the_yaml_form_gives_the_planned_values(recipes, tmp_path):
    path = recipes / "Meta-FCOS-pretrain.yaml"
    cfg, settings = load_recipe(str(path))
    plan = make_plan(cfg, Hardware(2, ims_per_gpu=15), method="max_memory")
    target = tmp_path / "planned.yaml"
    target.write_text(plan_yaml(plan, str(path), settings, str(tmp_path)))
    assert load_recipe(str(target))[0] == plan.apply(cfg)


def test_a_plain_detectron2_recipe_stays_readable_by_detectron2(write_config, tmp_path):
    path = write_config("SOLVER: {REFERENCE_WORLD_SIZE: 8, IMS_PER_BATCH: 16}\n")
    cfg, settings = load_recipe(path)
    plan = make_plan(cfg, Hardware(1), method="per_gpu")
    text = plan_yaml(plan, path, settings, str(tmp_path))
    assert set(yaml.safe_load(text)) == {"_BASE_", "SOLVER"}
    assert "# in d2go also, without effect here: QUANTIZATION.QAT.START_ITER: 280000" in text


def test_micro_batches_that_plain_engines_do_not_have_are_told(recipes, tmp_path):
    path = recipes / "experiment-1-baseline.yaml"
    cfg, settings = load_recipe(str(path))
    plan = make_plan(cfg, Hardware(1, ims_per_gpu=4), method="keep_total")
    assert "# d2scale runs a step in 4 micro-batches" in plan_yaml(
        plan, str(path), settings, str(tmp_path)
    )


def test_a_name_that_a_terminal_would_obey_is_one_cell():
    assert r"| one\n\x1b[31mtwo |" in table(["name"], [("one\n\x1b[31mtwo",)])
