"""Any config is planned and checked for training, or refused: a line a fault, exit status 2."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from d2scale.config.defaults import add_project_configs, get_cfg
from d2scale.config.loading import flatten
from wrong_values import VALUES, cases

BASE = "d2scale://MetaFCOS/small-cpu.yaml"


def _known_keys():
    cfg = get_cfg()
    add_project_configs(cfg)
    return sorted(key for key, _ in flatten(cfg))


KEYS = [*_known_keys(), "SOLVER", "MODEL", "D2SCALE.NONE", "_BASE_", "1"]
SETTINGS = st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4)
METHODS = st.sampled_from(["per_gpu", "keep_total", "max_memory"])


pytestmark = pytest.mark.usefixtures("place")


def write(settings, path):
    nested = {"_BASE_": BASE}
    for key, value in settings.items():
        *above, last = key.split(".")
        node = nested
        for part in above:
            node = node.setdefault(part, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node[last] = value
    path.write_text(yaml.safe_dump(nested, allow_unicode=True), encoding="utf-8")
    return str(path)


@cases(60)
@given(settings=SETTINGS, gpus=st.integers(-1, 20), method=METHODS)
def test_any_config_is_planned_or_refused(settings, gpus, method, refused_well, tmp_path):
    config = write(settings, tmp_path / "config.yaml")
    refused_well("plan", config, "--gpus", str(gpus), "--method", method)


@cases(40)
@given(settings=SETTINGS)
@example(settings={"DATASETS.TEST": ["coco_pretrain_val_base", []]})
def test_any_config_is_checked_for_training(settings, refused_well, tmp_path):
    config = write(settings, tmp_path / "config.yaml")
    refused_well("train", "--engine", "default", "--config-file", config)


# Keys that nobody has, and words that argparse may take for its own.
HOSTILE = [
    "",
    ".",
    "SOLVER.",
    ".MAX_ITER",
    "SOLVER..STEPS",
    "__class__",
    "SOLVER.__dict__",
    "-",
    "--",
]
WORDS = st.sampled_from([*KEYS, *HOSTILE]) | VALUES.map(str)


@cases(60)
@given(
    pairs=st.lists(st.tuples(st.sampled_from(KEYS), VALUES.map(str)), max_size=3),
    words=st.lists(WORDS, max_size=2),
)
def test_any_override_is_planned_or_refused(pairs, words, refused_well):
    refused_well("plan", BASE, *(word for pair in pairs for word in pair), *words)


PATHS = st.sampled_from(
    ["", ".", "..", "/", "/dev/null", "nowhere", "\0", "\ud800", "x" * 300, "config.yaml"]
)
NAMES = st.sampled_from(["a", "../a", "coco_2017_train", "a\nb", "\ud800", ""]) | st.text(
    max_size=5
)


@cases(40)
@given(
    columns=st.tuples(*[st.lists(each, max_size=2) for each in (NAMES, PATHS, PATHS)]),
    command=st.sampled_from(
        [["train", "--engine", "default", "--config-file"], ["data"], ["plan"]]
    ),
)
@example(columns=(["now"], ["nowhere"], ["\0"]), command=["plan"])
def test_any_own_dataset_is_used_or_refused(columns, command, refused_well, tmp_path):
    keys = ("NAMES", "IM_DIRS", "JSON_FILES")
    section = dict(zip(keys, columns, strict=True))
    settings = {"DATASETS.TRAIN": columns[0], "DATASETS.TEST": []}
    settings |= {f"D2GO_DATA.DATASETS.COCO_INJECTION.{key}": section[key] for key in keys}
    refused_well(*command, write(settings, tmp_path / "config.yaml"))


@cases(100)
@given(
    text=st.one_of(st.text(max_size=60), st.text("[]{}:,-&*!<>|'\"#%@ \n\tab01_BASE.", max_size=60))
)
@example(text="? [a]\n: 1\n")
@example(text="<<: [1, 2]\n")
@example(text="a: 2026-02-30\n")
def test_any_text_is_a_config_or_none(text, refused_well, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    refused_well("plan", str(path))


LEAVES = ["1", "~", "*a", "*b", "0x1F", "1e5", "1:30", "2026-02-30", "!!int x", "=", "on", '"\\0"']
LEAVES += ["!!python/tuple [1]", "!!python/object/apply:os.system [x]", "!!binary x", "!!set {a}"]
NODES = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]"),
        st.lists(inner, max_size=3).map(lambda parts: f"{{<<: [{', '.join(parts)}], k: 1}}"),
        st.lists(inner, max_size=3).map(
            lambda parts: f"{{{', '.join(f'MAX_ITER{n}: {part}' for n, part in enumerate(parts))}}}"
        ),
        st.tuples(st.sampled_from(["&a", "&b"]), inner).map(" ".join),
        st.tuples(st.integers(0, 60), inner).map(lambda drawn: "[" * drawn[0] + drawn[1]),
        st.integers(0, 60).map(lambda depth: "[" * depth + "]" * depth),
    ),
    max_leaves=8,
)


@cases(100)
@given(pairs=st.lists(st.tuples(st.sampled_from([*KEYS, "<<"]), NODES), max_size=5))
@example(pairs=[("MODEL", "&a {<<: *a}")])
@example(pairs=[("_BASE_", "&a [*a]")])
@example(pairs=[("MODEL", "[" * 100_000)])
def test_any_yaml_with_anchors_is_a_config_or_none(pairs, refused_well, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"{key}: {node}\n" for key, node in pairs))
    refused_well("plan", str(path))
