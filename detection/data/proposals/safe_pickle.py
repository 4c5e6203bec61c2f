"""Unpickle plain containers and numpy arrays, and refuse everything else.

A pickle is a program: it can import and call any function. Here the few names that numpy arrays need resolve to stand-in classes in this
file, and every other name is refused. numpy's own unpickling code, which does not validate its input, is not called.

A pickle of a few bytes can also exhaust the memory: with lists that contain each other repeatedly or, in the C unpickler, with a large
memo index. So the number of entries is limited, and the pure-Python unpickler is used, which takes seconds for COCO's 118,000 images.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from roi_quantization.detection.common.errors import InputError

MAX_SHARED_ENTRIES = 1_000_000  # entries beyond one per byte of the file, which only objects that are referenced repeatedly can cause


class UnsafePickleError(ValueError):
    """A pickle names something that is neither a container nor an array of numbers."""


def read_pickle(path: Path | str) -> Any:
    """Read a pickle of dicts, lists, tuples, numbers, strings, bytes and numpy arrays, from Python 2 or 3 and numpy 1 or 2.

    Returns:
        The content. Tuples and arrays of objects become (nested) lists.

    Raises:
        ValueError: the file is damaged.
        UnsafePickleError: the pickle refers to something else, which was not run.
    """
    with open(path, "rb") as file:
        try:
            content = _Unpickler(file, encoding="latin1").load()  # latin1 keeps the bytes of Python 2's strings
            return _Converter(max_entries=MAX_SHARED_ENTRIES + file.tell()).convert(content)
        except UnsafePickleError as error:
            raise UnsafePickleError(
                f"{path} {error}. A pickle can run any code, so only containers and numpy arrays are read: write the file again without "
                "it, or as .npz (docs/proposals.md), on a machine where you trust the file."
            ) from None
        except Exception as error:  # a damaged pickle can raise anything
            raise InputError(f"{path} is not a complete pickle of containers and numpy arrays: {error or type(error).__name__}") from error


class _Dtype:
    """Stand-in for `numpy.dtype`. The pickle sets the byte order afterwards, as part of the state."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        self.name, self.order = name, "|"

    def __setstate__(self, state: Sequence) -> None:
        self.order = state[1]

    def convert(self) -> np.dtype | None:
        """Return the dtype, None for objects."""
        if self.name == "O8":
            return None
        if self.name[:1] not in ("b", "i", "u", "f", "S", "U") or not self.name[1:].isdigit() or self.order not in "<>|=":
            raise UnsafePickleError(f"has an array of dtype {self.name!r}; expected numbers")
        return np.dtype(self.order + self.name)


class _Array:
    """Stand-in for `numpy.ndarray`. The pickle sets its state afterwards."""

    def __setstate__(self, state: Sequence) -> None:
        _, self.shape, self.dtype, self.fortran, self.content = state

    def convert(self) -> Any:
        """Return the array; a number if it is 0-dimensional, a list of its unconverted entries if it is of objects."""
        dtype = self.dtype.convert()
        if dtype is None:
            return list(self.content)
        content = self.content.encode("latin1") if isinstance(self.content, str) else self.content
        array = np.frombuffer(content, dtype).reshape(self.shape, order="F" if self.fortran else "C").copy()
        return array if array.ndim else array.item()


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    return _Array()


def _frombuffer(content: bytes, dtype: _Dtype, shape: Sequence[int], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


def _scalar(dtype: _Dtype, content: bytes | str) -> Any:
    return _frombuffer(content, dtype, (), "C")


def _encode(text: str, encoding: str) -> bytes:
    """Stand-in for `_codecs.encode`, with which Python 3 writes bytes in protocols 0 to 2."""
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    """Stand-in for `bytes()`, with which Python 3 writes empty bytes in protocols 0 to 2."""
    return b""


_STAND_INS = {
    ("numpy", "ndarray"): "numpy.ndarray",  # the first argument of _reconstruct
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty_bytes,
    ("builtins", "bytes"): _empty_bytes,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise UnsafePickleError(f"asks for {module}.{name}, and was not read") from None

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError("refers to something outside itself")


class _Converter:
    """Replaces the stand-ins inside a container by arrays; raises `ValueError` after `max_entries` entries."""

    def __init__(self, max_entries: int):
        self.left = max_entries

    def convert(self, value: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise InputError("its lists contain each other repeatedly")
        if isinstance(value, _Array):
            value = value.convert()
        if isinstance(value, dict):
            return {self.convert(key): self.convert(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.convert(entry) for entry in value]
        return value
