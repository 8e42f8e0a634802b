import builtins
import importlib.util
import pickle

import pytest

import d2scale
from d2scale.cli import main
from d2scale.errors import (
    ConfigError,
    D2ScaleError,
    DataError,
    Fault,
    MissingPackageError,
    collecting,
)

FAULT = Fault("SOLVER.MAX_ITER", 0, "1 or more", "set it")


@pytest.mark.parametrize(
    "error", [ConfigError([FAULT]), DataError([FAULT]), MissingPackageError("torch", "this", "do")]
)
def test_an_error_survives_the_way_from_a_rank_to_its_parent(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)


def test_a_fault_that_two_checks_find_is_one_line():
    other = Fault("SOLVER.STEPS", [1], "increasing", "sort them")
    assert ConfigError([FAULT, other, FAULT]).faults == (FAULT, other)


def test_a_long_value_is_cut_and_one_that_cannot_be_written_is_named():
    assert len(str(Fault("KEY", "x" * 10**6, "less", "cut it"))) < 600
    assert len(str(Fault(*["x" * 10**6] * 4))) < 8000
    assert "int, too large to show" in str(Fault("KEY", 10**5000, "less", "cut it"))


def test_a_fault_says_what_is_allowed_and_what_to_do():
    assert str(FAULT) == "SOLVER.MAX_ITER is 0; allowed: 1 or more; set it"


def test_a_key_that_a_terminal_would_obey_is_shown_in_one_line():
    hostile = "A\n\x1b[31mB\udcff"
    for fault in (Fault(hostile, 0, "1", "set it"), Fault("K", hostile, hostile, hostile)):
        assert str(fault).isprintable()
    assert str(D2ScaleError(f"one\ntwo {hostile[2:]}")) == "one\n" r"two \x1b[31mB\udcff"


def test_many_faults_are_counted_not_shown():
    faults = [Fault(f"KEY{number}", 0, "1", "set it") for number in range(10_000)]
    assert str(ConfigError(faults)).splitlines()[-1] == "and 9900 more faults"


def test_faults_of_several_checks_are_collected_once_each():
    faults = []
    for _ in range(2):
        with collecting(faults):
            raise DataError([FAULT])
    assert ConfigError(faults).faults == (FAULT,)


def test_the_runner_says_what_it_needs():
    if importlib.util.find_spec("d2go"):
        assert d2scale.Runner.__name__ == "Runner"
        return
    with pytest.raises(MissingPackageError, match=r"d2scale\.Runner needs .*see 'With d2go'"):
        _ = d2scale.Runner
    with pytest.raises(AttributeError):
        _ = d2scale.Nothing


def test_training_without_torch_is_told_in_one_line(monkeypatch, capsys):
    real = builtins.__import__

    def without_torch(name, *arguments, **keywords):
        if name == "d2scale.engine.run":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    assert main(["train", "--config-file", "d2scale://MetaFCOS/small-cpu.yaml"]) == 2
    engine, line = capsys.readouterr().err.splitlines()
    assert engine.startswith("d2scale: engine default: ")
    assert line == (
        "d2scale: error: this command needs torch, which is not installed; "
        "pip install 'd2scale[train]'"
    )
