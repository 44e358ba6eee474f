"""Reading InsightFace's pickled verification sets without running what a pickle may ask for.

A pickle names functions that its reader shall call. Those that such files need (they are written by Python 2 and 3,
with images and flags as plain or as NumPy values) are answered by stand-ins that hold bytes; any other name ends the
reading. NumPy itself never sees the pickle.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.redaction import in_short

MALFORMED = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
    struct.error,
)
NUMBERS = frozenset({"b1", "u1", "i1", "i2", "i4", "i8"})


class _Type:
    """Stands in for a NumPy dtype: its code, such as u1 or S5, and its byte order."""

    def __init__(self, code: str | bytes, *_flags: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code
        if self.code not in NUMBERS and not (self.code[:1] == "S" and self.code[1:].isdecimal()):
            raise pickle.UnpicklingError(f"NumPy values of type {self.code!r}")
        self.order = "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self.order = order.decode() if isinstance(order, bytes) else order

    def values(self, raw: bytes) -> list[Any]:
        """The values that the bytes hold, as plain Python."""
        return [raw] if self.code[:1] == "S" else np.frombuffer(raw, self.order + self.code).tolist()


class Array:
    """Stands in for a NumPy array: its type and its bytes."""

    def __init__(self, *_empty: Any) -> None:
        self.type, self.raw = _Type("u1"), b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._fill(state[2], state[4])

    def _fill(self, kind: Any, raw: Any) -> None:
        if not isinstance(kind, _Type) or not isinstance(raw, bytes | bytearray):
            raise pickle.UnpicklingError("a NumPy array that does not hold bytes or numbers")
        self.type, self.raw = kind, bytes(raw)

    @classmethod
    def from_buffer(cls, raw: Any, kind: Any, *_shape: Any) -> Array:
        """Fill one as pickle's protocol 5 does."""
        array = cls()
        array._fill(kind, raw)
        return array

    def tolist(self) -> list[Any]:
        """The values as plain Python."""
        return self.type.values(self.raw)


def _scalar(kind: _Type, raw: bytes) -> Any:
    (value,) = kind.values(raw)
    return value


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2: as the text of the same code points."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding!r}")
    return text.encode("latin1")


STAND_INS: dict[str, Callable[..., Any]] = {
    "builtins.bytes": lambda: b"",
    "__builtin__.bytes": lambda: b"",
    "_codecs.encode": _encode,
    "numpy.dtype": _Type,
    "numpy.ndarray": Array,
    **{f"numpy.{core}.multiarray._reconstruct": Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": Array.from_buffer for core in ("core", "_core")},
}


class _Unpickler(pickle._Unpickler):  # type: ignore[misc, name-defined, unused-ignore]
    """In Python: the one in C makes room for as many objects as a number in the pickle claims."""

    def find_class(self, module: str, name: str) -> Any:
        stand_in = STAND_INS.get(f"{module}.{name}")
        if stand_in is None:
            raise pickle.UnpicklingError(f"{module}.{name}")
        # A function of its own each time: a pickle may set attributes of what it is given.
        return lambda *arguments: stand_in(*arguments)  # noqa: PLW0108


def load_pickled(path: Path) -> Any:
    """Read a pickle of lists, tuples, bytes, numbers and NumPy values of bytes and numbers.

    Returns:
        The content; NumPy arrays as `Array`, their scalars as plain values, text of Python 2 as bytes.

    Raises:
        DataError: the file cannot be read, is no pickle, or holds anything else.
    """
    try:
        with path.open("rb") as stream:
            return _Unpickler(stream, encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except MALFORMED as error:
        reason = in_short(error)
        raise DataError(
            f"{path} is no pickle of images and booleans, or is cut off ({reason[:120]}); fetch it again"
        ) from None
