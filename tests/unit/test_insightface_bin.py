"""InsightFace's .bin: every way that it is pickled in the wild, and nothing else."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.sources_eval import BinSource, BinSourceConfig
from pipeline.data.sources_eval.pickled import STAND_INS
from pipeline.errors import DataError
from tests.unit.eval_sets import encode, put, samples_of

IMAGES = [encode(number) for number in range(6)]
SAME = [True, False, True]


def source(path: Path, parts: int = 2) -> BinSource:
    return BinSource(BinSourceConfig(path=path, parts=parts))


def python2(images: list[bytes], same: list[bool]) -> bytes:
    """Python 2's pickle of protocol 2: str as BINSTRING, bool as NEWTRUE and NEWFALSE."""
    strings = b"".join(b"T" + struct.pack("<i", len(image)) + image for image in images)
    flags = b"".join(b"\x88" if flag else b"\x89" for flag in same)
    return b"\x80\x02](" + strings + b"e](" + flags + b"e\x86."


def python2_text(images: list[bytes], same: list[bool]) -> bytes:
    """Python 2's pickle of protocol 0: all in letters."""
    strings = b"".join(b"S" + repr(image)[1:].encode() + b"\na" for image in images)
    flags = b"".join(b"I01\na" if flag else b"I00\na" for flag in same)
    return b"((l" + strings + b"(l" + flags + b"t."


def python2_numpy(images: list[bytes], same: list[bool]) -> bytes:
    """Python 2's pickle of protocol 2 with an array of uint8 for each image, and booleans of NumPy."""

    def string(raw: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(raw)) + raw

    def kind(code: bytes) -> bytes:
        made = b"cnumpy\ndtype\n" + string(code) + b"K\x00K\x01\x87R"
        return made + b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"

    def array(raw: bytes) -> bytes:
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
        return made + b"(K\x01J" + struct.pack("<i", len(raw)) + b"\x85" + kind(b"u1") + b"\x89" + string(raw) + b"tb"

    def scalar(flag: bool) -> bytes:
        return b"cnumpy.core.multiarray\nscalar\n" + kind(b"b1") + string(bytes([flag])) + b"\x86R"

    return b"\x80\x02](" + b"".join(map(array, images)) + b"e](" + b"".join(map(scalar, same)) + b"e\x86."


def arrays(images: list[bytes]) -> list[Any]:
    return [np.frombuffer(image, np.uint8) for image in images]


IN_THE_WILD = {
    "python2": python2(IMAGES, SAME),
    "python2 text": python2_text(IMAGES, SAME),
    "python2 numpy": python2_numpy(IMAGES, SAME),
    **{f"protocol {number}": pickle.dumps((IMAGES, SAME), number) for number in range(6)},
    **{f"arrays, protocol {number}": pickle.dumps((arrays(IMAGES), np.array(SAME)), number) for number in range(6)},
    "columns of imencode": pickle.dumps(([array[:, None] for array in arrays(IMAGES)], SAME)),
    "writable arrays": pickle.dumps(([array.copy() for array in arrays(IMAGES)], SAME), 5),
    "numpy scalars": pickle.dumps(([np.bytes_(image) for image in IMAGES], [np.bool_(flag) for flag in SAME])),
    "numbers": pickle.dumps([IMAGES, [np.int64(flag) for flag in SAME]], 4),
    "big-endian numbers": pickle.dumps([IMAGES, np.array(SAME, ">i4")], 4),
}


@pytest.mark.parametrize("kind", IN_THE_WILD)
def test_pairs_are_read_however_they_are_pickled(tmp_path: Path, kind: str) -> None:
    put(tmp_path / "lfw.bin", IN_THE_WILD[kind])
    bin_source = source(tmp_path / "lfw.bin")
    samples = samples_of(bin_source, tmp_path)
    assert bin_source.name == "lfw"
    assert [samples[f"{place:06d}"].image for place in range(6)] == IMAGES
    pairs = bin_source.protocol().pairs
    assert pairs is not None
    assert pairs["first"].to_pylist() == ["000000", "000002", "000004"]
    assert pairs["second"].to_pylist() == ["000001", "000003", "000005"]
    assert pairs["same"].to_pylist() == SAME
    equal = [samples[f"{2 * p:06d}"].identity == samples[f"{2 * p + 1:06d}"].identity for p in range(3)]
    assert equal == SAME
    assert len({sample.identity for sample in samples.values()}) == 4


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_every_pair_is_in_one_part(tmp_path: Path, parts: int) -> None:
    put(tmp_path / "a.bin", IN_THE_WILD["python2"])
    assert len(source(tmp_path / "a.bin", parts).parts()) == min(parts, 3)
    assert len(samples_of(source(tmp_path / "a.bin", parts), tmp_path)) == 6


class Command:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "ran"
    evil = Command(os.system, f"touch {mark}")
    put(tmp_path / "evil.bin", pickle.dumps(([*IMAGES[:5], evil], SAME), protocol))
    with pytest.raises(DataError, match=r"evil\.bin is no pickle of images and booleans.*posix\.system"):
        source(tmp_path / "evil.bin")
    assert not mark.exists()


@pytest.mark.parametrize(
    "call", [(eval, "1"), (getattr, 1, "real"), (__import__, "os"), (np.load, "x"), (bytearray, 3)]
)
def test_no_other_name_is_resolved(tmp_path: Path, call: tuple[Any, ...]) -> None:
    put(tmp_path / "evil.bin", pickle.dumps((IMAGES, Command(*call)), 4))
    with pytest.raises(DataError, match="is no pickle of images and booleans"):
        source(tmp_path / "evil.bin")


def test_a_pickle_cannot_change_what_later_files_are_read_with(tmp_path: Path) -> None:
    # BUILD with (None, {name: value}) sets an attribute of what stands on the stack: here of the answer to a name.
    put(tmp_path / "evil.bin", b"\x80\x02c_codecs\nencode\nN}X\x04\x00\x00\x00markK\x01s\x86b.")
    with pytest.raises(DataError, match="does not hold two lists"):
        source(tmp_path / "evil.bin")
    assert not any(hasattr(stand_in, "mark") for stand_in in STAND_INS.values())
    put(tmp_path / "good.bin", IN_THE_WILD["arrays, protocol 4"])
    assert len(samples_of(source(tmp_path / "good.bin"), tmp_path)) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is cut off"),
        (b"\x89PNG\r\n", "is no pickle"),
        (IN_THE_WILD["python2"][:-40], "is cut off"),
        (pickle.dumps(IMAGES), "does not hold two lists"),
        (pickle.dumps((IMAGES, 3)), "does not hold two lists"),
        (pickle.dumps((b"".join(IMAGES), SAME)), "does not hold two lists"),
        (pickle.dumps(([], [])), "does not hold two lists"),
        (pickle.dumps({"a": 1}), "does not hold two lists"),
        (pickle.dumps((IMAGES[:5], SAME)), "has 5 images for 3 pairs, not two a pair"),
        (pickle.dumps((IMAGES, [True, 2, False])), r"pair 1 \(from 0\) is marked 2, neither true nor false"),
        (pickle.dumps((IMAGES, [True, True, None])), r"pair 2 \(from 0\) is marked None"),
        (pickle.dumps((IMAGES, [True, True, 0.5])), r"pair 2 \(from 0\) is marked 0\.5"),
        (pickle.dumps((IMAGES, np.array([1.0, 0.0, 1.0]))), "NumPy values of type 'f8'"),
        (pickle.dumps((np.array([*IMAGES, None], object), SAME)), "NumPy values of type 'O8'"),
    ],
)
def test_malformed_files_are_told_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    put(tmp_path / "bad.bin", content)
    with pytest.raises(DataError, match=rf"bad\.bin.*{message}") as caught:
        source(tmp_path / "bad.bin")
    assert "\n" not in str(caught.value)


def test_an_image_that_is_no_bytes_is_named_by_its_place(tmp_path: Path) -> None:
    put(tmp_path / "bad.bin", pickle.dumps(([*IMAGES[:3], "text", *IMAGES[4:]], SAME)))
    with pytest.raises(DataError, match=r"bad\.bin: image 3 \(from 0\) is of type str, not bytes"):
        samples_of(source(tmp_path / "bad.bin"), tmp_path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.bin cannot be read: No such file"):
        source(tmp_path / "none.bin")
