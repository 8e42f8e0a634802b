import math

import pytest

from d2scale.cli import main
from d2scale.config import get_cfg, load_cfg, load_recipe
from d2scale.config.loading import flatten
from d2scale.config.value_rules import (
    Rule,
    judge,
    number,
    one_of,
    or_none,
    type_of_default,
    whole,
)
from d2scale.errors import ConfigError

ANY_TYPE = [None, True, "abc", "", (), (1,), {}, 1.5, math.nan, math.inf, 10**400, object()]


@pytest.mark.parametrize("value", [*ANY_TYPE, 0, 4])
def test_whole_numbers(value):
    assert whole("KEY", 1, 3).faults(value) != []
    assert whole("KEY", 1, 3).faults(3) == []


@pytest.mark.parametrize("value", [None, True, "0.5", (0.5,), math.nan, math.inf, 0, 1, 10**400])
def test_numbers_exclude_bounds_and_what_is_no_finite_number(value):
    assert number("KEY", above=0, below=1).faults(value) != []
    assert number("KEY", above=0, below=1).faults(0.5) == []


def test_numbers_include_bounds():
    rule = number("KEY", least=0, most=1)
    assert rule.faults(0) == rule.faults(1.0) == []
    assert rule.faults(-0.1) != []
    assert rule.faults(1.1) != []


@pytest.mark.parametrize("value", [*ANY_TYPE, 0])
def test_a_choice_has_the_type_of_its_choices(value):
    rule = one_of("KEY", (1, "", False))
    allowed = value == ""
    assert (rule.faults(value) == []) is allowed


@pytest.mark.parametrize("value", ANY_TYPE)
def test_a_test_that_fails_on_a_wrong_type_is_a_fault(value):
    assert Rule("KEY", "three", lambda value: value[2] > 0).faults(value) != []
    assert Rule("KEY", "a name", lambda value: value.lower() == "x").faults(value) != []


def test_none_is_allowed_only_where_it_is_named():
    rule = or_none(number("KEY", least=0))
    assert rule.faults(None) == []
    assert "or None" in str(rule.faults(-1)[0])


def test_keys_that_an_engine_lacks_are_skipped():
    cfg = get_cfg()
    cfg.SOLVER.GAMMA = None
    rules = (number("SOLVER.GAMMA", above=0), number("SOLVER.NO_SUCH_KEY", above=0))
    (fault,) = judge(cfg, rules)
    assert str(fault) == "SOLVER.GAMMA is None; allowed: a number above 0; correct it"


@pytest.mark.parametrize(
    ("default", "right", "wrong"),
    [
        (1, 2, (True, 1.5, "1", None, (1,))),
        (1.0, 2, (True, "1", None)),
        (True, False, (1, None)),
        ("a", "", (1, None)),
        ((1,), [2, 3], ((1.5,), ("a",), (None,), 1, "1", None)),
        ((0.9, 0.999), (0, 1), (("a", "b"), ((0.9,),))),
        ((), ("x", 1), ("x", None)),
    ],
)
def test_a_value_has_the_type_of_its_default(default, right, wrong):
    rule = type_of_default("KEY", default)
    assert rule.faults(right) == []
    for value in wrong:
        assert rule.faults(value) != [], value


@pytest.mark.parametrize("load", [load_cfg, load_recipe])
@pytest.mark.parametrize("key", [key for key, _ in flatten(get_cfg())])
def test_no_key_may_be_null_unless_it_says_so(load, key, recipes):
    path = str(recipes / "small-cpu.yaml")
    if key in ("SOLVER.WEIGHT_DECAY_BIAS", "SOLVER.WEIGHT_DECAY_NORM"):
        load(path, [key, "None"])
        return
    with pytest.raises(ConfigError) as raised:
        load(path, [key, "None"])
    assert [fault.key for fault in raised.value.faults] == [key]


WRONG_TYPES = [
    ("SOLVER.WEIGHT_DECAY_BIAS", "abc"),
    ("SOLVER.BETAS", "('a','b')"),
    ("SOLVER.STEPS", "('a', 5)"),
    ("INPUT.MIN_SIZE_TRAIN", "()"),
    ("INPUT.MIN_SIZE_TRAIN", "('a',1)"),
    ("SOLVER.AUTO_SCALING_METHODS", "(1,)"),
    ("SEED", "None"),
    ("SOLVER.MAX_ITER", "None"),
]


@pytest.mark.parametrize("command", [["plan"], ["memory"], ["train", "--config-file"]])
@pytest.mark.parametrize(("key", "value"), WRONG_TYPES)
def test_values_of_the_wrong_type_end_every_command_in_one_line(
    command, key, value, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = [*command, "d2scale://MetaFCOS/small-cpu.yaml", "OUTPUT_DIR", "run"]
    assert main([*arguments, key, value]) == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if key in line]
    assert line.startswith(f"d2scale: error: {key} is ")
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_fault_names_the_type_of_the_entries():
    (fault,) = type_of_default("SOLVER.STEPS", (30000,)).faults(("a", 5))
    assert fault.allowed == "a list of int, such as (30000,)"


def test_on_without_quotes_is_told_what_yaml_makes_of_it(write_config):
    with pytest.raises(ConfigError, match=r"is True; .*in quotes: without them YAML reads on"):
        load_cfg(write_config("D2SCALE: {SYNC_BN: on}"))
