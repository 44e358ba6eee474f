"""Encoded images of every kind that packing meets."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

WIDTH, HEIGHT = 48, 40


def ramp() -> Image.Image:
    """A smooth picture, which no decoder may show in another way."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return Image.fromarray(np.stack([x * 5, y * 6, (x + y) * 2], -1).astype(np.uint8))


def noise(number: int, side: int = 24) -> Image.Image:
    """A picture of noise, different for every number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG chunk by chunk: Pillow writes neither 16 bits of colour nor a header without its pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def png16(pixels: npt.NDArray[np.uint16]) -> bytes:
    """(H, W, 1, 3 or 4) 16 bits a channel."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(width, height, 16, {1: 0, 3: 2, 4: 6}[channels], rows)


def odd_but_good() -> dict[str, bytes]:
    """Images that are rare, and right."""
    image = ramp()
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    wide = np.asarray(image).astype(np.uint16) * 257 + 37
    opaque = np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
    return {
        "progressive jpg": encode(image, "JPEG", progressive=True),
        "gray jpg": encode(image.convert("L"), "JPEG"),
        "cmyk jpg": encode(image.convert("CMYK"), "JPEG", quality=95),
        "rgb jpg": encode(image, "JPEG", keep_rgb=True),
        "jpg with a preview": encode(image, "MPO", save_all=True, append_images=[image.rotate(90)]),
        "png of 16 bits": png16(wide),
        "png of 16 bits and alpha": png16(np.concatenate([wide, opaque], -1)),
        "png of 16 bits of gray": png16(wide[..., :1]),
        "png of 1 bit": encode(image.convert("1")),
        "png with a palette": encode(image.quantize(8), transparency=3),
        "png with a transparent colour": encode(image, transparency=(0, 0, 0)),
        "png with alpha": encode(alpha),
        "png of gray with alpha": encode(alpha.convert("LA")),
        "webp without loss": encode(image, "WEBP", lossless=True),
        "webp with alpha": encode(alpha, "WEBP", lossless=True, exact=True),
    }
