"""Any bytes and any content of a checkpoint or of pickled weights are read, refused or harmless."""

from __future__ import annotations

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from checkpoints import resume, write_checkpoint
from d2scale.config import load_cfg
from d2scale.engine.checkpoint.files import last_whole_checkpoint, read_checkpoint
from meta_fcos.weights import read_state
from plans import plan_of
from training_processes import RECIPE
from wrong_values import VALUES, cases, changed, may_be_refused, places_in, wrong_bytes

pytestmark = pytest.mark.filterwarnings("ignore:Validating sparse tensor")
TENSORS = st.sampled_from(
    [
        torch.ones(2),
        torch.ones(2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(3, 2).int(),
        torch.tensor(1.5),
        torch.tensor([]),
        torch.ones(2, dtype=torch.complex64),
    ]
)
# A changed recipe or plan is refused key by key, which other tests show.
LEFT_OUT = [("d2scale", "recipe"), ("d2scale", "plan")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


class Run:
    """A run's folder with a checkpoint, which cases change."""

    def __init__(self, folder, recipe):
        self.folder = folder
        self.cfg = load_cfg(str(recipe), ["OUTPUT_DIR", str(folder)])
        self.plan = plan_of(recipe, 1)
        self.path = write_checkpoint(folder, self.cfg, self.plan)
        self.whole = self.path.read_bytes()

    def content(self):
        return torch.load(io.BytesIO(self.whole))

    def resume(self):
        (self.folder / "last_checkpoint").write_text(self.path.name)
        resume(self.folder, self.cfg, self.plan)


@pytest.fixture(scope="module")
def run(folder, recipe):
    return Run(folder, recipe)


@cases(60)
@given(data=st.data())
def test_any_content_is_resumed_from_or_refused(data, run):
    content = run.content()
    places = [place for place in places_in(content) if place[:2] not in LEFT_OUT]
    changes = st.tuples(st.sampled_from(places), VALUES | TENSORS)
    for place, value in data.draw(st.lists(changes, min_size=1, max_size=2), "changes"):
        if place in [*places_in(content)]:
            content = changed(content, place, value)
    torch.save(content, run.path)
    with may_be_refused():
        run.resume()


def _mixed(content: bytes, numbers) -> bytes:
    """Return a zip archive whose members have each other's contents; some may be gone."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w") as new:
        names = old.namelist()
        for name, number in zip(names, numbers, strict=False):
            new.writestr(name, old.read(names[number % len(names)]))
    return target.getvalue()


def _same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one == other


@cases(60)
@given(data=st.data())
def test_changed_bytes_are_refused_or_change_nothing(data, run):
    run.path.write_bytes(data.draw(wrong_bytes(run.whole)))
    with may_be_refused():
        assert _same(read_checkpoint(run.path), run.content())


@cases(40)
@given(numbers=st.lists(st.integers(0, 100), min_size=5, max_size=40))
def test_members_of_an_archive_that_are_mixed_are_refused_or_harmless(numbers, run):
    run.path.write_bytes(_mixed(run.whole, numbers))
    with may_be_refused():
        run.resume()


@cases(40)
@given(name=st.binary(max_size=40) | st.text(max_size=300).map(str.encode))
@example(name=b"../elsewhere.pth")
@example(name=b"..")
@example(name=b"model_0000000.pth\nmodel_0000001.pth")
def test_any_last_checkpoint_names_one_of_the_folder_or_none(name, run):
    (run.folder.parent / "elsewhere.pth").write_bytes(run.whole)
    run.path.write_bytes(run.whole)
    (run.folder / "last_checkpoint").write_bytes(name)
    with may_be_refused():
        path, _ = last_whole_checkpoint(run.folder)
        assert path == run.path


class Call:
    """Pickles as a call of a function, and then a state for what it returns."""

    def __init__(self, function, arguments, state):
        self.reduced = (function, tuple(arguments), *[state] * (state is not None))

    def __reduce__(self):
        return self.reduced


_RECONSTRUCT, _, _ = np.ones(1).__reduce__()
FUNCTIONS = [
    *(np.dtype, np.ndarray, _RECONSTRUCT, np.float64(0).__reduce__()[0]),
    *(bytes, bytearray, int, float, complex, str, tuple, list, set, frozenset, dict),
    np.ones(1).__reduce_ex__(5)[0],
]
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["f4", "O", "i8,O", "V8", "U2", "<", "|", "C", "F", np.ndarray, b"A" * 8]),
    st.text(max_size=8),
    st.binary(max_size=40),
)
OBJECTS = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=8).map(tuple),
        st.builds(
            Call,
            st.sampled_from(FUNCTIONS),
            st.lists(inner, max_size=4),
            st.none() | inner,
        ),
    ),
    max_leaves=12,
)
WEIGHTS = pickle.dumps(
    {"conv1_w": np.ones((2, 2), np.float32), "res2_0_branch2a_bn_s": np.ones(2), "x": [1, "y"]}, 2
)


@cases(100)
@given(
    content=wrong_bytes(WEIGHTS) | st.dictionaries(st.text(max_size=3), OBJECTS).map(pickle.dumps)
)
def test_any_pickle_is_read_or_refused(content, folder):
    (folder / "weights.pkl").write_bytes(content)
    with may_be_refused():
        read_state(folder / "weights.pkl")
