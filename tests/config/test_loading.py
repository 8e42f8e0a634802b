import pytest

from d2scale.config import load_cfg, load_recipe
from d2scale.config.loading import load_yaml, shipped_configs
from d2scale.config.safe_yaml import UnreadValue
from d2scale.errors import ConfigError
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan


def message_of(load, *arguments):
    with pytest.raises(ConfigError) as raised:
        load(*arguments)
    return str(raised.value)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_loads_in_the_engine_and_plans(name):
    url = f"d2scale://{name}"
    load_cfg(url)
    cfg, _ = load_recipe(url)
    make_plan(cfg, Hardware(2, ims_per_gpu=2))


def test_later_bases_win_and_the_file_wins_over_them(write_config):
    write_config("SOLVER: {BASE_LR: 0.1, MAX_ITER: 50, STEPS: []}\n", "a.yaml")
    write_config("SOLVER: {BASE_LR: 0.2, WARMUP_ITERS: 7}\n", "b.yaml")
    path = write_config("_BASE_: [a.yaml, b.yaml]\nSOLVER: {WARMUP_ITERS: 9}\n")
    assert load_yaml(path) == {
        "SOLVER": {"BASE_LR": 0.2, "MAX_ITER": 50, "STEPS": [], "WARMUP_ITERS": 9}
    }


def test_a_shipped_base_opens_from_anywhere(write_config):
    path = write_config("_BASE_: d2scale://MetaFCOS/experiment-1-baseline.yaml\n")
    assert load_cfg(path).SOLVER.MAX_ITER == 30000


def test_overrides_win_and_are_converted(recipes):
    opts = ["SOLVER.BASE_LR", "1", "SOLVER.STEPS", "(5, 7)", "DATASETS.TRAIN", "('x',)"]
    cfg = load_cfg(str(recipes / "Meta-FCOS-pretrain.yaml"), opts)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS, cfg.DATASETS.TRAIN) == (1.0, (5, 7), ("x",))


def billion_laughs(twice):
    """Return YAML of 24 values, each of which holds the one before it twice."""
    lines = ["a0: &a0 [1]", *(f"a{n}: &a{n} {twice.format(f'*a{n - 1}')}" for n in range(1, 25))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SOLVER: [", "line 1"),
        ("- 1\n- 2\n", "KEY: value"),
        ("SEED: !date 2026\n", "could not determine a constructor for the tag '!date'"),
        ("_BASE_: recipe.yaml\n", "a chain that ends"),
        ("_BASE_: {a: b}\n", "a file name, or a list of them"),
        ("_BASE_: nowhere.yaml\n", "nowhere.yaml"),
        ("_BASE_: d2scale://nowhere.yaml\n", "keep_total.yaml"),
        ("_BASE_: https://example.com/x.yaml\n", "a file, or d2scale://NAME.yaml"),
        ("SEED: 2026-02-30\n", "day is out of range"),
        ("SEED: !!int abc\n", "invalid literal"),
        ('_BASE_: "a\\0b"\n', "null byte"),
        ("[" * 3000, "more than 50 levels"),
        ("SEED: " + "{a: " * 60 + "1" + "}" * 60, "more than 50 levels"),
        ("MODEL: &model {SELF: *model}\n", "more than 50 levels"),
        ("SOLVER: {STEPS: &steps [*steps]}\n", "more than 50 levels"),
        (billion_laughs("[{0}, {0}]"), "more than 50000 values"),
        (billion_laughs("{{x: {0}, y: {0}}}"), "more than 50000 values"),
        ("SEED: 1\n" * 100_000, "more than 524288 characters"),
        ("1: 2\n", "KEY: value"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(write_config, text, expected):
    message = message_of(load_yaml, write_config(text))
    assert expected in message
    assert "\n" not in message


def test_bases_that_are_read_twice_on_every_level_end(write_config):
    for level in range(28):
        write_config(f"_BASE_: [{level + 1}.yaml, {level + 1}.yaml]\n", f"{level}.yaml")
    write_config("SEED: 1\n", "28.yaml")
    message = message_of(load_yaml, write_config("_BASE_: 0.yaml\n"))
    assert "at most 200 files to read" in message


def test_aliases_of_one_mapping_are_overridden_apart(write_config):
    write_config("A: &both {X: 1}\nB: *both\n", "a.yaml")
    assert load_yaml(write_config("_BASE_: a.yaml\nA: {X: 2}\n")) == {"A": {"X": 2}, "B": {"X": 1}}


def test_a_cycle_of_two_is_named(write_config):
    write_config("_BASE_: b.yaml\n", "a.yaml")
    write_config("_BASE_: a.yaml\n", "b.yaml")
    message = message_of(load_yaml, write_config("_BASE_: a.yaml\n"))
    assert "a.yaml ->" in message
    assert "b.yaml ->" in message


def test_missing_files_and_folders_are_named(tmp_path):
    assert "nowhere.yaml" in message_of(load_yaml, str(tmp_path / "nowhere.yaml"))
    assert str(tmp_path) in message_of(load_yaml, str(tmp_path))


def test_a_binary_file_is_no_config(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\x80\x04\x95\xff")
    assert "x.yaml" in message_of(load_yaml, str(tmp_path / "x.yaml"))


def test_the_engine_refuses_every_key_that_it_does_not_have_at_once(write_config):
    path = write_config("SOLVER: {BASE_LRR: 0.1, MAX_ITER: ten}\nMODEL: {MASK_ON: true}\n")
    lines = message_of(load_cfg, path).splitlines()
    assert len(lines) == 3
    assert "did you mean SOLVER.BASE_LR?" in lines[0]
    assert "int, such as 40000" in lines[1]
    assert "MODEL.MASK_ON" in lines[2]


@pytest.mark.parametrize(
    ("solver", "engine"), [("BASE_LR: 0.1", "detectron2"), ("BETAS: [0.9, 0.99]", "d2go")]
)
def test_the_recipe_of_another_engines_model_is_one_line(write_config, solver, engine):
    text = "MODEL: {META_ARCHITECTURE: GeneralizedRCNN, RPN: {NMS_THRESH: 0.7}, MASK_ON: True}\n"
    with pytest.raises(ConfigError) as raised:
        load_cfg(write_config(f"{text}SOLVER: {{{solver}}}\n"))
    (line,) = str(raised.value).splitlines()
    assert line.startswith("MODEL.META_ARCHITECTURE is 'GeneralizedRCNN'; allowed: a model of")
    assert line.endswith(f"train with --engine {engine}")


def test_planning_passes_over_other_keys_but_not_misspelt_ones(write_config):
    path = write_config("MODEL: {MASK_ON: true}\nOTHER: {KEY: 1}\nSOLVER: {OPTIMIZER: sgd}\n")
    load_recipe(path)
    for text in ("SOLVER: {MAX_ITERS: 5}", "SOLVRE: {MAX_ITER: 5}", "D2SCALE: {ZZZ: 5}"):
        assert "keys that exist" in message_of(load_recipe, write_config(text))


def test_overrides_must_be_pairs_of_known_keys(recipes):
    path = str(recipes / "Meta-FCOS-pretrain.yaml")
    assert "give SOLVER.BASE_LR a value" in message_of(load_recipe, path, ["SOLVER.BASE_LR"])
    assert "did you mean" in message_of(load_recipe, path, ["SOLVER.BASE_LRX", "1"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.MAX_ITER", "10.5"),
        ("SOLVER.STEPS", "5"),
        ("SOLVER.BASE_LR", "fast"),
        ("SOLVER.AMP.ENABLED", "1"),
        ("SOLVER.MAX_ITER", "1" + "0" * 30),
        ("SOLVER.STEPS", "(1" + "0" * 30 + ",)"),
        ("SOLVER.BASE_LR", "None"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(recipes, key, value):
    message = message_of(load_cfg, str(recipes / "Meta-FCOS-pretrain.yaml"), [key, value])
    assert message.startswith(f"{key} is ")


TAGGED = """\
MODEL:
  ANCHOR_GENERATOR:
    SIZES: !!python/object/apply:eval ["[[x, x * 2] for x in [32, 64]]"]
INPUT: {MIN_SIZE_TRAIN: !!python/object/apply:os.system ["touch x"]}
SOLVER: {STEPS: !!python/tuple [5, 7], MAX_ITER: 9}
"""


def test_python_tags_stay_unread_text_in_a_recipe_to_plan(write_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(TAGGED, "base.yaml")
    cfg, settings = load_recipe(write_config("_BASE_: base.yaml\n"))
    assert cfg.SOLVER.STEPS == (5, 7)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (800,)
    sizes = settings["MODEL.ANCHOR_GENERATOR.SIZES"]
    assert isinstance(sizes, UnreadValue)
    assert sizes == '!!python/object/apply:eval ["[[x, x * 2] for x in [32, 64]]"]'
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("load", [load_recipe, load_cfg])
@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("SOLVER: {BASE_LR: !!python/object/apply:eval ['0.01 * 2']}\n", "SOLVER.BASE_LR"),
        ("SOLVER: !!python/object/apply:os.system ['touch x']\n", "SOLVER"),
    ],
)
def test_a_python_tag_where_planning_needs_the_value_is_one_line(write_config, load, text, key):
    message = message_of(load, write_config(text))
    assert message.startswith(f'{key} is "!!python/object/apply:')
    assert "without a Python tag" in message
    assert "\n" not in message


def test_the_engine_reads_no_python_tag_at_all_but_an_override_replaces_it(write_config):
    path = write_config("INPUT: {MIN_SIZE_TRAIN: !!python/object/apply:eval ['(1, 2)']}\n")
    assert 'INPUT.MIN_SIZE_TRAIN is "!!python' in message_of(load_cfg, path)
    assert load_cfg(path, ["INPUT.MIN_SIZE_TRAIN", "(640,)"]).INPUT.MIN_SIZE_TRAIN == (640,)


@pytest.mark.parametrize(
    ("text", "engine"),
    [
        ("MODEL: {RETINANET: {NUM_CONVS: 1}}", "detectron2"),
        ("MODEL: {RETINANET: {NUM_CONVS: 1}}\nD2GO: {A: 1}", "d2go"),
    ],
)
def test_a_key_is_refused_with_the_engine_that_has_it(write_config, text, engine):
    with pytest.raises(ConfigError, match=f"remove it, or train with --engine {engine}\\b"):
        load_cfg(write_config(text))
