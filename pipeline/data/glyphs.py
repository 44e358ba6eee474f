"""Characters as images: which ones, how they are drawn, and how a test image is degraded."""

from __future__ import annotations

import hashlib
import io
import math
from collections import Counter
from collections.abc import Iterable
from functools import cache

import numpy as np
import numpy.typing as npt
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FILL = 0.8  # the longer side of a glyph's ink, as a part of the image's side

DRAWN = 1.5  # font size at which a glyph is drawn before it is scaled down, as a part of the image's side

# Ranges of the degradation; lengths in pixels of a 40 x 40 image, and scaled with the image's side.
ROTATION_DEG = 15.0
SCALE = (0.8, 1.1)
SHIFT_PX = 3.0
BLUR_SIGMA_PX = 1.2
NOISE_SIGMA = (10.0, 40.0)  # of 255
REFERENCE_SIDE = 40


@cache
def jis_kanji() -> tuple[str, ...]:
    """Return the 6,355 kanji of JIS X 0208 (rows 16 to 84), in the order of the standard."""
    characters = []
    for row in range(16, 85):
        for cell in range(1, 95):
            try:
                characters.append(bytes((0xA0 + row, 0xA0 + cell)).decode("euc_jp"))
            except UnicodeDecodeError:  # an unassigned cell
                continue
    return tuple(characters)


def identity_key(character: str) -> str:
    """Return the identity key of a character, such as `U+4E00`."""
    return f"U+{ord(character):04X}"


def draw_typeface(slices: Iterable[bytes], size: int) -> dict[str, Image.Image]:
    """Draw every JIS kanji that a typeface has, white on black, centred.

    Blank glyphs are left out, and so is every bitmap that stands for two characters: fonts draw the same box
    or the same shape for characters they lack, and a label that two identities share teaches nothing.

    Args:
        slices: woff2 fonts; the first one that maps a character draws it.
        size: side of the images in pixels.

    Returns:
        Character -> greyscale (mode L) image of `size` x `size`, in the order of the standard.
    """
    drawn: dict[str, Image.Image] = {}
    wanted = {ord(character) for character in jis_kanji()}
    for woff2 in slices:
        with TTFont(io.BytesIO(woff2), lazy=True) as tables:
            present = wanted.intersection(tables.getBestCmap() or {})
        if not present:
            continue
        font = ImageFont.truetype(io.BytesIO(woff2), round(DRAWN * size), layout_engine=ImageFont.Layout.BASIC)
        for code in present:
            image = _draw(chr(code), font, size)
            if image is not None:
                drawn[chr(code)] = image
        wanted -= present
    copies = Counter(image.tobytes() for image in drawn.values())
    return {c: drawn[c] for c in jis_kanji() if c in drawn and copies[drawn[c].tobytes()] == 1}


def _draw(character: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image | None:
    """Draw one glyph at the font's size, then scale its ink to FILL of the side; None when there is no ink."""
    side = 2 * round(font.size)
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).text((side // 2, side // 2), character, fill=255, font=font, anchor="mm")
    box = canvas.getbbox()
    if box is None:
        return None
    factor = FILL * size / max(box[2] - box[0], box[3] - box[1])
    width, height = max(1, round((box[2] - box[0]) * factor)), max(1, round((box[3] - box[1]) * factor))
    image = Image.new("L", (size, size))
    ink = canvas.resize((width, height), Image.Resampling.BOX, box=box)
    image.paste(ink, ((size - width) // 2, (size - height) // 2))
    return image


def degrade(image: Image.Image, seed: int, key: str) -> Image.Image:
    """Return the image rotated, scaled, shifted, blurred and made noisy, as a fixed function of (seed, key).

    Args:
        image: square greyscale image.
        seed: seed of the data set.
        key: key of the sample, so that no image's degradation depends on another's.
    """
    digest = hashlib.sha256(f"degrade:{seed}:{key}".encode()).digest()
    draw = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    unit = image.width / REFERENCE_SIDE
    angle = math.radians(draw.uniform(-ROTATION_DEG, ROTATION_DEG))
    scale = draw.uniform(*SCALE)
    shift_x, shift_y = draw.uniform(-SHIFT_PX, SHIFT_PX, size=2) * unit
    moved = image.transform(
        image.size,
        Image.Transform.AFFINE,
        _inverse_affine(image.width, angle, scale, float(shift_x), float(shift_y)),
        Image.Resampling.BILINEAR,
    )
    blurred = moved.filter(ImageFilter.GaussianBlur(draw.uniform(0.0, BLUR_SIGMA_PX) * unit))
    noise_HW = draw.normal(0.0, draw.uniform(*NOISE_SIGMA), size=(image.height, image.width))
    noisy_HW: npt.NDArray[np.float64] = np.asarray(blurred, np.float64) + noise_HW
    return Image.fromarray(np.clip(np.rint(noisy_HW), 0, 255).astype(np.uint8))


def _inverse_affine(
    side: int, angle: float, scale: float, shift_x: float, shift_y: float
) -> tuple[float, float, float, float, float, float]:
    """Coefficients that take a target pixel back to its source, turning and scaling about the image's centre."""
    centre = side / 2
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    to_x, to_y = centre + shift_x, centre + shift_y
    return (cos, sin, centre - cos * to_x - sin * to_y, -sin, cos, centre + sin * to_x - cos * to_y)


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)  # 5% larger than the default, in half the time
    return buffer.getvalue()
