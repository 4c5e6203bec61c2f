"""Pickles: what is read as pickle itself would read it, and what is refused before it runs."""

import os
import pickle
import resource
import shutil
from collections import OrderedDict

import numpy as np
import pytest

from roi_quantization.detection.data.proposals.safe_pickle import UnsafePickleError, read_pickle


def save(path, value, protocol=pickle.HIGHEST_PROTOCOL):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.arange(8, dtype=np.uint16).reshape(2, 4)[:, ::-1],
        np.asfortranarray(np.arange(12, dtype=">f8").reshape(3, 4)),
        np.zeros((0, 4), np.int64),
        np.array([True, False]),
        np.array(["a", "bc"]),
    ],
)
def test_arrays_come_back_as_they_were(tmp_path, array, protocol):
    found = read_pickle(save(tmp_path / "a.pkl", {"a": [array]}, protocol))["a"][0]
    assert found.dtype == array.dtype and np.array_equal(found, array)
    found[...] = 0  # they can be written to


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_scalars_and_arrays_of_arrays(tmp_path, protocol):
    objects = np.empty(2, object)
    objects[:] = [np.ones((1, 4)), np.zeros((2, 4), np.float32)]
    found = read_pickle(save(tmp_path / "a.pkl", {"boxes": objects, "id": np.int64(7), "more": (1, "x", b"y", None, 0.5)}, protocol))
    assert [entry.shape for entry in found["boxes"]] == [(1, 4), (2, 4)]
    assert found["id"] == 7 and found["more"] == [1, "x", b"y", None, 0.5]


def test_a_pickle_of_python_2(tmp_path):
    """Written by hand as Python 2 wrote it: the array's bytes are a string, and numpy is numpy.core."""
    state = b"(I1\n(I2\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00@'\ntb."
    (tmp_path / "a.pkl").write_bytes(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR" + state)
    assert read_pickle(tmp_path / "a.pkl").tolist() == [1.0, 2.0]


class Runs:
    """What it does when it is read: anything."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (lambda path: Runs(os.system, f"touch {path}"), r"posix\.system"),
        (lambda path: Runs(eval, f"open({str(path)!r}, 'w')"), r"eval"),
        (lambda path: Runs(shutil.copy, __file__, str(path)), r"shutil\.copy"),
        (lambda path: Runs(getattr, 1, "real"), r"getattr"),
        (lambda path: Runs(np.save, str(path), np.ones(3)), r"numpy\.save"),
        (lambda path: OrderedDict(), r"collections\.OrderedDict"),
    ],
)
def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path, evil, name, protocol):
    trace = tmp_path / "trace"
    path = save(tmp_path / "evil.pkl", {"boxes": [np.ones((1, 4)), evil(trace)]}, protocol)
    with pytest.raises(UnsafePickleError, match=rf"evil\.pkl asks for \S*{name}, and was not read.*as \.npz"):
        read_pickle(path)
    assert not trace.exists()


def test_a_name_inside_an_allowed_one_is_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile_\x93.")
    with pytest.raises(UnsafePickleError, match=r"asks for numpy\.ndarray\.tofile_"):
        read_pickle(tmp_path / "a.pkl")


def test_a_dtype_with_fields_is_refused(tmp_path):
    """Fields could call bytes a pointer."""
    path = save(tmp_path / "a.pkl", np.zeros(2, [("x", "f4"), ("y", "O")]))
    with pytest.raises(UnsafePickleError, match=r"an array of dtype 'V12'"):
        read_pickle(path)


def test_a_pickle_that_grows_when_it_is_read_is_refused(tmp_path):
    """Forty lists, each with the one before it twice: a few hundred bytes, 10^12 entries."""
    lists = []
    for _ in range(40):
        lists = [lists, lists]
    with pytest.raises(ValueError, match=r"a\.pkl is not a complete pickle.*its lists contain each other repeatedly"):
        read_pickle(save(tmp_path / "a.pkl", lists))


def test_a_pickle_that_holds_itself_is_refused(tmp_path):
    lists = []
    lists.append(lists)
    with pytest.raises(ValueError, match=r"a\.pkl is not a complete pickle"):
        read_pickle(save(tmp_path / "a.pkl", lists))


def test_a_large_index_into_the_memo_takes_no_memory(tmp_path):
    """The unpickler in C makes room for 2^32 entries, 32 GB, when it reads these eight bytes."""
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_pickle(tmp_path / "a.pkl") == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


@pytest.mark.parametrize("kept", [0, 1, 40, -1])
def test_a_damaged_pickle_is_named(tmp_path, kept):
    path = save(tmp_path / "a.pkl", {"boxes": [np.ones((4, 4))]})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"a\.pkl is not a complete pickle"):
        read_pickle(path)
