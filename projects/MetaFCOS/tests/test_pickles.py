from __future__ import annotations

import codecs
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from d2scale.errors import CheckpointError
from meta_fcos.pickles import load_pickle


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_in_plain_containers_are_read(tmp_path, protocol):
    content = OrderedDict(
        single=np.arange(6, dtype=np.float32).reshape(2, 3).T,
        double=np.float64(1.5),
        plain={"list": [1, 2.5, "text", None, True], "set": {1}, "bytes": b"\xff"},
    )
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
    found = load_pickle(tmp_path / "x.pkl")
    np.testing.assert_array_equal(found["single"], content["single"])
    assert found["double"] == 1.5
    assert found["plain"] == content["plain"]


def test_files_of_python_2_are_read(tmp_path):
    # As Python 2 wrote them: byte strings for names and data, and its own module names.
    text = (
        b"\x80\x02}q\x00U\x07conv1_wq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\n"
        b"ndarray\nq\x03K\x00\x85U\x01b\x87Rq\x04(K\x01K\x02\x85cnumpy\ndtype\nq\x05U\x02f4K\x00"
        b"K\x01\x87Rq\x06(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U\x08\x00\x00\x80?\x00\x00\x00\xc0tbs."
    )
    (tmp_path / "x.pkl").write_bytes(text)
    assert load_pickle(tmp_path / "x.pkl")["conv1_w"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    ("harmful", "named"),
    [
        (Calls(os.system, "touch harmed"), r"\w+\.system"),
        (Calls(eval, "open('harmed', 'w')"), r"builtin\w*\.eval"),
        (Calls(getattr, "", "join"), r"builtin\w*\.getattr"),
        (Calls(np.load, "harmed"), r"numpy.*load"),
    ],
    ids=["system", "eval", "getattr", "numpy"],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_calls_are_refused_by_name(tmp_path, monkeypatch, harmful, named, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"conv1_w": harmful}, protocol))
    with pytest.raises(CheckpointError, match=named):
        load_pickle(tmp_path / "x.pkl")
    assert not (tmp_path / "harmed").exists()


def test_only_the_encoding_of_old_bytes_is_allowed(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Calls(codecs.encode, "ab", "rot13"), 2))
    with pytest.raises(CheckpointError, match="rot13"):
        load_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x04\x95"])
def test_other_files_are_unreadable(tmp_path, content):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match="unreadable"):
        load_pickle(tmp_path / "x.pkl")


def test_a_folder_is_unreadable(tmp_path):
    with pytest.raises(CheckpointError, match="unreadable"):
        load_pickle(tmp_path)
