"""A fuzzer that waits for ever fails, and how many cases there were is told."""

import faulthandler
import os

import pytest

import wrong_values
from d2scale.benchmark import measure
from d2scale.cli import main
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.engine import memory
from d2scale.engine import run as engine_run

_MOST_SECONDS = 900  # of a test, on a busy machine


def pytest_collection_modifyitems(items):
    for item in items:
        if "/fuzz/" in str(item.path):
            item.add_marker(pytest.mark.timeout(_MOST_SECONDS))


@pytest.fixture(autouse=True)
def _end_even_in_c(pytestconfig):
    """A signal is seen by Python alone, not by a loop in a library."""
    # What is captured when the process ends at once is shown to nobody.
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        terminal = os.dup(2)
    faulthandler.dump_traceback_later(_MOST_SECONDS + 60, exit=True, file=terminal)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(terminal)


def pytest_terminal_summary(terminalreporter):
    if wrong_values.tried:
        terminalreporter.write_line(f"fuzzers: {wrong_values.tried} cases")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty working directory, drawn datasets, ranks that do nothing, and no long measuring."""
    root = write_shapes_dataset(tmp_path_factory.mktemp("shapes"), 12, 4, image_size=(64, 96))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        patch.setenv("DETECTRON2_DATASETS", str(root))
        patch.setattr(engine_run, "launch", lambda *arguments, **options: {})
        patch.setattr(memory, "make_profiles", lambda *arguments, **options: ())
        for name in ("measure_inference", "measure_training"):
            patch.setattr(measure, name, lambda *arguments: {})
        yield root


@pytest.fixture
def refused_well(capsys):
    """Run a command line and judge its status and what it says."""

    def run(*words):
        begin = "d2scale: error: "
        try:
            status = main(words)
        except SystemExit as error:  # of argparse, which tells the usage as well
            status, begin = error.code, ""
        output = capsys.readouterr()
        assert status in (0, 2)
        lines = output.err.removesuffix("\n").split("\n")
        lines = [line for line in lines if not line.startswith("d2scale: engine")]
        assert all(line.isprintable() for line in lines)
        assert sum(map(len, lines)) < 20_000
        if status == 2:
            assert "error: " in output.err
            assert all(line.startswith(begin) for line in lines)
        else:
            assert "Traceback" not in output.err

    return run
