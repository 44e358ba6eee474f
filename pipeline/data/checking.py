"""Whether an image can be decoded: asked of every image once, at packing."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from pydantic import Field

from pipeline.schema import Config

FORMATS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}  # Pillow's name -> extension in the shard
PILLOW_LIMIT = 178_956_970  # pixels at which Pillow itself refuses to open an image
BYTES_LIMIT = 1 << 31

EMPTY = "empty"
UNKNOWN = "no image of a known format"
TRUNCATED = "truncated"
BROKEN = "does not decode"
TOO_LARGE = "too large"
TOO_SMALL = "too small"
ANIMATED = "animated"
OTHER_FORMAT = "neither png, jpg nor webp"


class ImageLimits(Config):
    """How small and how large an image may be; the header is asked, before anything is decoded."""

    min_size: int = Field(default=2, ge=1, description="Images with a side of fewer pixels are rejected.")
    max_pixels: int = Field(
        default=1 << 26, ge=1, le=PILLOW_LIMIT, description="Images of more pixels (width x height) are rejected."
    )


class Checked(NamedTuple):
    """What is known of an image that decodes: the extension that its content calls for, and its size in pixels."""

    extension: str
    width: int
    height: int


class RejectedError(Exception):
    """An image that is not packed; the only argument is the reason."""


def check_image(image: bytes, limits: ImageLimits) -> Checked:
    """Decode an image wholly; its content counts, not its name.

    What passes, DALI decodes as Pillow does, CMYK, palettes and 16 bits a channel included (tests hold it to that).

    Raises:
        RejectedError: it is empty, truncated, broken, animated, of another format, or beyond the limits.
    """
    if not image:
        raise RejectedError(EMPTY)
    if len(image) >= BYTES_LIMIT:
        raise RejectedError(TOO_LARGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken EXIF, many pixels: neither keeps an image from being decoded
        try:
            with Image.open(io.BytesIO(image)) as opened:
                checked = _check_header(opened, limits)
                opened.load()
        except UnidentifiedImageError:
            raise RejectedError(UNKNOWN) from None
        except Image.DecompressionBombError:
            raise RejectedError(TOO_LARGE) from None
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as error:
            raise RejectedError(TRUNCATED if "truncated" in str(error).lower() else BROKEN) from None
    return checked


def _check_header(opened: Image.Image, limits: ImageLimits) -> Checked:
    """What the header tells; a decoder of a format that is not ours is never run."""
    if opened.format not in FORMATS:
        raise RejectedError(OTHER_FORMAT)
    if opened.width * opened.height > limits.max_pixels:
        raise RejectedError(TOO_LARGE)
    if min(opened.size) < limits.min_size:
        raise RejectedError(TOO_SMALL)
    # MPO: a JPEG that has further pictures, such as a preview, behind its own. Every decoder shows the first.
    if opened.format != "MPO" and getattr(opened, "is_animated", False):
        raise RejectedError(ANIMATED)
    return Checked(FORMATS[opened.format], *opened.size)
