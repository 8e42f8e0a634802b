import json

import pytest

from d2scale.config import load_cfg
from d2scale.errors import ConfigError
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan
from d2scale.run_folder.contents import (
    holds_run,
    last_checkpoint,
    read_json,
    write_config,
    write_machine,
    write_plan,
)


def test_config_plan_and_machine_can_be_read_again(tmp_path, recipes):
    cfg = load_cfg(str(recipes / "small-cpu.yaml"))
    plan = make_plan(cfg, Hardware(2))
    write_config(tmp_path, cfg)
    write_plan(tmp_path, plan)
    write_machine(tmp_path, {"cpu": "a"})
    assert load_cfg(str(tmp_path / "config.yaml")) == cfg
    assert read_json(tmp_path / "plan.json") == json.loads(json.dumps(plan.to_json()))
    assert read_json(tmp_path / "machine.json") == {"cpu": "a"}
    assert (tmp_path / "machine.json").read_text() == '{\n  "cpu": "a"\n}\n'


def test_what_is_not_there_is_empty(tmp_path):
    assert read_json(tmp_path / "plan.json") == {}


@pytest.mark.parametrize("text", ["{half", "[1]", "\x00", "[" * 100_000])
def test_what_is_no_json_object_is_a_fault(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match=r"plan\.json"):
        read_json(tmp_path / "plan.json")


def test_the_last_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert not holds_run(tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_final.pth\n")
    assert last_checkpoint(tmp_path) == tmp_path / "model_final.pth"
    assert holds_run(tmp_path)
    (tmp_path / "last_checkpoint").write_bytes(b"\xff")
    assert last_checkpoint(tmp_path) is None
