"""A fuzzer that waits for ever fails, and how many cases there were is told."""

import faulthandler

import pytest

import wrong_values

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
