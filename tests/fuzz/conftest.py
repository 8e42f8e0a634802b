"""A fuzzer that waits for ever fails, and how many cases there were is told."""

import faulthandler

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
def _end_even_in_c():
    # A signal is seen by Python alone, not by a loop in a library.
    faulthandler.dump_traceback_later(_MOST_SECONDS + 60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


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
        try:
            status = main(words)
        except SystemExit as error:  # of argparse
            status = error.code
        output = capsys.readouterr()
        assert status in (0, 2)
        lines = [line for line in output.err.split("\n") if not line.startswith("d2scale: engine")]
        assert all(line.isprintable() for line in lines)
        assert sum(map(len, lines)) < 20_000
        if status == 2:
            assert "error: " in output.err

    return run
