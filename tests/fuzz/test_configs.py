"""Any config is planned and checked for training, or refused: a line a fault, exit status 2."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from d2scale.cli import main
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config.defaults import add_project_configs, get_cfg
from d2scale.config.loading import flatten
from d2scale.engine import run as engine_run
from wrong_values import VALUES, cases

BASE = "d2scale://MetaFCOS/small-cpu.yaml"


def _known_keys():
    cfg = get_cfg()
    add_project_configs(cfg)
    return sorted(key for key, _ in flatten(cfg))


KEYS = [*_known_keys(), "SOLVER", "MODEL", "D2SCALE.NONE", "_BASE_", "1"]
SETTINGS = st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4)
METHODS = st.sampled_from(["per_gpu", "keep_total", "max_memory"])


@pytest.fixture(scope="module", autouse=True)
def _place(tmp_path_factory):
    """An empty working directory, drawn datasets, and ranks that do nothing."""
    root = write_shapes_dataset(tmp_path_factory.mktemp("shapes"), 12, 4, image_size=(64, 96))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        patch.setenv("DETECTRON2_DATASETS", str(root))
        patch.setattr(engine_run, "launch", lambda *arguments, **options: {})
        yield


@pytest.fixture
def refused_well(capsys):
    """Run a command line and judge its status and what it says."""

    def run(*words):
        status = main(words)
        output = capsys.readouterr()
        assert status in (0, 2)
        lines = [line for line in output.err.splitlines() if not line.startswith("d2scale: engine")]
        if status == 2:
            assert lines
            assert all(line.startswith("d2scale: error: ") and line.isprintable() for line in lines)
            assert sum(map(len, lines)) < 20_000
        return status

    return run


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


@cases(120)
@given(settings=SETTINGS, gpus=st.integers(-1, 20), method=METHODS)
def test_any_config_is_planned_or_refused(settings, gpus, method, refused_well, tmp_path):
    config = write(settings, tmp_path / "config.yaml")
    refused_well("plan", config, "--gpus", str(gpus), "--method", method)


@cases(40)
@given(settings=SETTINGS)
def test_any_config_is_checked_for_training(settings, refused_well, tmp_path):
    config = write(settings, tmp_path / "config.yaml")
    refused_well("train", "--engine", "default", "--config-file", config)


@cases(60)
@given(pairs=st.lists(st.tuples(st.sampled_from(KEYS), VALUES.map(str)), min_size=1, max_size=3))
def test_any_override_is_planned_or_refused(pairs, refused_well):
    words = [word for key, value in pairs for word in (key, value) if not value.startswith("-")]
    if len(words) == 2 * len(pairs):
        refused_well("plan", BASE, *words)


@cases(150)
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
