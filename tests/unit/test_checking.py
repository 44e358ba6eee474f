"""What is accepted, what is refused and why; and that DALI shows what is accepted as Pillow does."""

import io
import tracemalloc
from typing import Any

import numpy as np
import pytest
from nvidia import dali
from PIL import Image

from pipeline.data.checking import ImageLimits, RejectedError, check_image
from tests.pictures import HEIGHT, WIDTH, encode, noise, odd_but_good, png, ramp

LIMITS = ImageLimits()
_dali: Any = dali


@_dali.pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)  # type: ignore[untyped-decorator]
def _single() -> Any:
    raw = _dali.fn.external_source(name="raw", ndim=1, dtype=_dali.types.UINT8)
    return _dali.fn.decoders.image(raw, device="cpu", output_type=_dali.types.RGB)


@pytest.fixture(scope="module")
def decoder() -> Any:
    pipe = _single()
    pipe.build()
    return pipe


def pixels(raw: bytes) -> np.ndarray[Any, Any]:
    """(H, W, 3) of 0 to 255; 16 bits of gray are scaled, where Pillow's own conversion to RGB clips them."""
    image = Image.open(io.BytesIO(raw))
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.float64) * 255 / 65535
        return np.repeat(gray[..., None], 3, axis=-1)
    return np.asarray(image.convert("RGB")).astype(np.float64)


@pytest.mark.parametrize("kind", odd_but_good())
def test_dali_decodes_what_is_accepted_as_pillow_does(decoder: Any, kind: str) -> None:
    raw = odd_but_good()[kind]
    assert check_image(raw, LIMITS)[1:] == (WIDTH, HEIGHT)
    decoder.feed_input("raw", [np.frombuffer(raw, np.uint8)])
    (images,) = decoder.run()
    assert np.abs(np.asarray(images.at(0)).astype(np.float64) - pixels(raw)).max() <= 1


def bad() -> dict[str, tuple[bytes, str]]:
    image, other = ramp(), ramp().rotate(180)
    whole, both = encode(noise(0, 64), "JPEG"), {"save_all": True, "append_images": [other]}
    broken = bytearray(encode(noise(1)))
    broken[60:80] = bytes(20)  # inside the compressed pixels
    return {
        "nothing": (b"", "empty"),
        "noise": (bytes(range(256)) * 4, "no image of a known format"),
        "half a jpg": (whole[: len(whole) // 2], "truncated"),
        "most of a png": (encode(noise(2))[:-200], "truncated"),
        "half a webp": (encode(noise(3), "WEBP", lossless=True)[:500], "does not decode"),
        "a broken png": (bytes(broken), "does not decode"),
        "a header alone": (whole[:20], "no image of a known format"),
        "a png without pixels": (png(40, 40, 8, 2, b""), "truncated"),
        "a gif": (encode(image, "GIF"), "neither png, jpg nor webp"),
        "a moving gif": (encode(image, "GIF", **both), "neither png, jpg nor webp"),
        "a moving webp": (encode(image, "WEBP", **both), "animated"),
        "a moving png": (encode(image, "PNG", **both), "animated"),
        "a tiff": (encode(image, "TIFF"), "neither png, jpg nor webp"),
        "a bmp": (encode(image, "BMP"), "neither png, jpg nor webp"),
        "one pixel": (encode(image.resize((1, 1))), "too small"),
        "one row": (encode(image.resize((9, 1)), "JPEG"), "too small"),
    }


@pytest.mark.parametrize("what", bad())
def test_what_is_no_good_image_is_refused_with_a_reason(what: str) -> None:
    raw, reason = bad()[what]
    with pytest.raises(RejectedError) as error:
        check_image(raw, LIMITS)
    assert str(error.value) == reason


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (8193, 8193), (1, 1 << 30)])
def test_a_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    """The pixels are not there to be decoded: who tried would tell something else, or fill the memory."""
    raw = png(width, height, 8, 2, bytes(1000))
    tracemalloc.start()
    with pytest.raises(RejectedError, match="too large"):
        check_image(raw, LIMITS)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_the_limits_are_options() -> None:
    one = encode(ramp().resize((1, 1)))
    assert check_image(one, ImageLimits(min_size=1)) == ("png", 1, 1)
    raw = encode(ramp())
    assert check_image(raw, ImageLimits(min_size=HEIGHT, max_pixels=WIDTH * HEIGHT)) == ("png", WIDTH, HEIGHT)
    with pytest.raises(RejectedError, match="too large"):
        check_image(raw, ImageLimits(max_pixels=WIDTH * HEIGHT - 1))
    with pytest.raises(RejectedError, match="too small"):
        check_image(raw, ImageLimits(min_size=HEIGHT + 1))


def test_the_content_names_the_extension() -> None:
    found = {kind: check_image(raw, LIMITS).extension for kind, raw in odd_but_good().items()}
    assert {kind: extension for kind, extension in found.items() if extension not in kind} == {}
