import subprocess
import sys

import pytest

from d2scale.config import load_cfg, load_recipe
from d2scale.errors import ConfigError
from d2scale.planning.coverage import choose_profile, coverage, find_profile, variant
from d2scale.planning.memory_profile import MemoryProfile, Phase

PHASES = (Phase("backward", 1, 1),)


def recipe_coverage(path, *opts):
    return coverage(*load_recipe(str(path), opts))


def test_a_recipe_is_covered_as_the_engines_config_of_it(recipes):
    path = recipes / "Meta-FCOS-pretrain.yaml"
    opts = ("MODEL.FCOS.NUM_CLASSES", "20", "SOLVER.AMP.ENABLED", "True")
    assert recipe_coverage(path, *opts) == coverage(load_cfg(str(path), opts))


@pytest.mark.parametrize(
    ("opts", "same"),
    [
        (("SOLVER.BASE_LR", "1.0", "MODEL.DEVICE", "cpu"), True),
        (("SOLVER.OPTIMIZER", "sgd_mt", "MODEL.WEIGHTS", "other.pkl"), True),
        (("INPUT.MIN_SIZE_TRAIN", "(800,)"), True),
        (("INPUT.MIN_SIZE_TRAIN", "(832,)"), False),
        (("MODEL.FCOS.NUM_CLASSES", "20"), False),
        (("MODEL.RESNETS.DEPTH", "101"), False),
        (("SOLVER.OPTIMIZER", "adamw"), False),
        (("SOLVER.AMP.ENABLED", "True"), False),
        (("D2SCALE.ACTIVATION_CHECKPOINTING", "True"), False),
    ],
)
def test_only_what_takes_memory_makes_a_difference(recipes, opts, same):
    path = recipes / "experiment-1-baseline.yaml"
    assert (recipe_coverage(path) == recipe_coverage(path, *opts)) is same


def test_a_profile_of_another_recipe_is_refused_and_both_are_named(recipes):
    path = recipes / "experiment-1-baseline.yaml"
    profile = MemoryProfile(PHASES, "predicted", covers=recipe_coverage(path))
    asked = recipe_coverage(path, "MODEL.RESNETS.DEPTH", "101", "SOLVER.AMP.ENABLED", "True")
    with pytest.raises(ConfigError) as raised:
        choose_profile([profile], asked, "p.json")
    lines = str(raised.value).splitlines()
    assert len(lines) == 2
    assert any("MODEL.RESNETS.DEPTH is 101" in line and "50" in line for line in lines)
    assert any("'16 bit'" in line and "'32 bit'" in line for line in lines)


def test_the_variant_that_fits_is_found(recipes):
    covers = recipe_coverage(recipes / "experiment-1-baseline.yaml")
    half = variant(covers, amp=True, checkpointing=False)
    profiles = [MemoryProfile(PHASES, name, covers=c) for name, c in (("a", covers), ("b", half))]
    assert choose_profile(profiles, half, "p.json").source == "b"
    assert find_profile(profiles[:1], half) is None


def test_a_profile_that_names_nothing_holds_for_everything(recipes):
    covers = recipe_coverage(recipes / "experiment-1-baseline.yaml")
    assert find_profile([MemoryProfile(PHASES, "measured")], covers) is not None


def test_it_needs_no_torch():
    code = "import sys, d2scale.planning.coverage; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_value_behind_a_python_tag_may_be_what_a_profile_was_made_with(write_config):
    text = "MODEL: {ANCHOR_GENERATOR: {SIZES: !!python/object/apply:eval ['[[32, 64]]']}}\n"
    cfg, settings = load_recipe(write_config(text))
    covers = coverage(cfg, settings)
    made_for = {**covers, "MODEL.ANCHOR_GENERATOR.SIZES": [[32, 64]]}
    profile = MemoryProfile((Phase("forward", 0, 1),), "predicted", covers=made_for)
    assert find_profile([profile], covers) is profile
    assert find_profile([profile], {**covers, "precision": "16 bit"}) is None
