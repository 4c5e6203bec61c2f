"""Pickles without code: plain containers and numpy arrays are read, and nothing else that a pickle may ask for.

A pickle is a program. It calls what it names, and so runs whatever its author likes. Here each name that numpy's arrays need is answered by
a small stand-in from this file, and every other name is refused: numpy's own unpickling, which trusts what it reads, has no part in it.

A few bytes can also ask for all memory: by lists that hold each other twice, over and over, and, of the unpickler in C, by a large index
into its memo. Hence a limit to the entries, and the unpickler in Python: it takes seconds for COCO's 118,000 images.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MOST_SHARED = 1_000_000  # entries beyond one for each byte of the file, which only those have that are in it several times


class UnsafePickleError(ValueError):
    """A pickle names something that is neither a container nor an array of numbers."""


def read_pickle(path: Path | str) -> Any:
    """What is in a pickle of dicts, lists, tuples, numbers, strings, bytes and numpy arrays, of Python 2 or 3 and numpy 1 or 2.

    Arrays of numbers come back as arrays, arrays of objects as (nested) lists.

    Raises `ValueError` that names the file: it is damaged, or it asks for something else (`UnsafePickleError`); nothing of that was run.
    """
    with open(path, "rb") as file:
        try:
            content = _Unpickler(file, encoding="latin1").load()  # latin1 keeps the bytes of Python 2's strings
            return _Plain(most=MOST_SHARED + file.tell()).of(content)
        except UnsafePickleError as error:
            raise UnsafePickleError(
                f"{path} {error}. A pickle runs what it names, so only containers and numpy arrays are read: write the file again without "
                "it, or as .npz (docs/proposals.md), on a machine that you trust it with."
            ) from None
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path} is not a whole pickle of containers and numpy arrays: {error or type(error).__name__}") from error


class _Dtype:
    """Stands for `numpy.dtype` of numbers; `order` comes after it, with the rest of the state."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        self.name, self.order = name, "|"

    def __setstate__(self, state: Sequence) -> None:
        self.order = state[1]

    def plain(self) -> np.dtype | None:
        """None for objects."""
        if self.name == "O8":
            return None
        if self.name[:1] not in ("b", "i", "u", "f", "S", "U") or not self.name[1:].isdigit() or self.order not in "<>|=":
            raise UnsafePickleError(f"has an array of dtype {self.name!r}; expected numbers")
        return np.dtype(self.order + self.name)


class _Array:
    """Stands for an array that `numpy` would build; its state comes after it."""

    def __setstate__(self, state: Sequence) -> None:
        _, self.shape, self.dtype, self.fortran, self.content = state

    def plain(self) -> Any:
        """The array, the number where it is a single one; of an array of objects a list of them as they are."""
        dtype = self.dtype.plain()
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
    return text.encode("latin1")  # how Python 3 writes bytes in the protocols of Python 2


def _no_bytes() -> bytes:
    return b""  # and empty ones


_STANDS_FOR = {
    ("numpy", "ndarray"): "numpy.ndarray",  # the first argument of _reconstruct
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STANDS_FOR[module, name]
        except KeyError:
            raise UnsafePickleError(f"asks for {module}.{name}, and was not read") from None

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError("refers to something outside itself")


class _Plain:
    """The same with arrays where their stand-ins are; ends with a ValueError after `most` entries."""

    def __init__(self, most: int):
        self.left = most

    def of(self, value: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("its lists hold each other over and over")
        if isinstance(value, _Array):
            value = value.plain()
        if isinstance(value, dict):
            return {self.of(key): self.of(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.of(entry) for entry in value]
        return value
