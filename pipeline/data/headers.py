"""How large an image says that it is: asked of every image before a decoder makes room for it.

A few hundred bytes may claim gigabytes of pixels. Pillow would tell as well, in 16 times the time
(JPEG) to 70 times (WebP), which a training loader does not have; it is asked of the formats that are not packed.
"""

from __future__ import annotations

import io
import struct
import warnings

from PIL import Image

from pipeline.data.checking import PILLOW_LIMIT

_PNG = b"\x89PNG\r\n\x1a\n"
_SIZES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # JPEG's markers that tell the size, SOF0 to SOF15
_BARE = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})  # JPEG's markers without a length
_PIXELS_BEGIN = frozenset({0xD9, 0xDA})


def too_large(raw: bytes) -> str | None:
    """Why an image is not decoded anywhere: it claims more pixels than Pillow decodes; None: it does not."""
    width, height = claimed_size(raw)
    pixels = width * height
    return f"too large: it claims {pixels:,} pixels, more than {PILLOW_LIMIT:,}" if pixels > PILLOW_LIMIT else None


def claimed_size(raw: bytes) -> tuple[int, int]:
    """Width and height by the header of an encoded image; (0, 0) where none is found, so that no decoder finds one."""
    try:
        if raw[:8] == _PNG:
            width, height = struct.unpack_from(">II", raw, 16)
            return width, height
        if raw[:2] == b"\xff\xd8":
            return _jpeg(raw)
        if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
            return _webp(raw)
        return _other(raw)
    except struct.error:  # it ends within its header
        return 0, 0


def _jpeg(raw: bytes) -> tuple[int, int]:
    """From the first frame header; what stands between segments is passed over, as decoders do."""
    place = 2
    while (place := raw.find(b"\xff", place)) >= 0:
        (marker,) = struct.unpack_from("B", raw, place + 1)
        if marker in _SIZES:
            height, width = struct.unpack_from(">HH", raw, place + 5)
            return width, height
        if marker in _PIXELS_BEGIN:
            break
        if marker == 0xFF:  # fills up
            place += 1
        elif marker in _BARE:
            place += 2
        else:
            place += 2 + struct.unpack_from(">H", raw, place + 2)[0]
    return 0, 0


def _webp(raw: bytes) -> tuple[int, int]:
    kind = raw[12:16]
    if kind == b"VP8X":  # 24 bits each, less 1
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", raw, 24)
        return (low_w | high_w << 16) + 1, (low_h | high_h << 16) + 1
    if kind == b"VP8L":  # 14 bits each, less 1
        (bits,) = struct.unpack_from("<I", raw, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", raw, 26)
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


def _other(raw: bytes) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(raw)) as opened:
                return opened.size
        except Image.DecompressionBombError:
            return PILLOW_LIMIT + 1, 1
        except (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError):
            return 0, 0
