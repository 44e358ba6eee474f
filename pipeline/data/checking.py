"""Whether an image can be decoded: asked of every image once, at packing."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

from PIL import Image, UnidentifiedImageError

FORMATS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}  # Pillow's name -> extension in the shard

EMPTY = "empty"
UNKNOWN = "no image of a known format"
TRUNCATED = "truncated"
BROKEN = "does not decode"
TOO_LARGE = "too large"
OTHER_FORMAT = "neither png, jpg nor webp"


class RejectedError(Exception):
    """An image that is not packed; the only argument is the reason."""


def check_image(image: bytes) -> str:
    """Decode an image wholly, and return the extension that its content (not its name) calls for.

    Raises:
        RejectedError: it is empty, truncated, broken, of another format, or beyond Pillow's limit of pixels.
    """
    if not image:
        raise RejectedError(EMPTY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken EXIF and the like do not keep an image from being decoded
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(image)) as opened:
                found = opened.format
                opened.load()
        except UnidentifiedImageError:
            raise RejectedError(UNKNOWN) from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise RejectedError(TOO_LARGE) from None
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as error:
            raise RejectedError(TRUNCATED if "truncated" in str(error).lower() else BROKEN) from None
    if found not in FORMATS:
        raise RejectedError(OTHER_FORMAT)
    return FORMATS[found]
