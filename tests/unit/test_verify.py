"""Every kind of damage is found before the first step, and named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.catalogue import save_catalogue
from pipeline.data.manifest import Manifest
from pipeline.data.store import LocalStore
from pipeline.data.verify import verify
from pipeline.errors import DataError
from pipeline.files import file_sha256
from pipeline.identities import IdentityTable
from tests.data_set import KEYS, make_data_set


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("made") / "set")


@pytest.fixture
def manifest(made: Manifest, tmp_path: Path) -> Manifest:
    shutil.copytree(made.folder, tmp_path / "set")
    return Manifest.load(tmp_path / "set")


def flip(path: Path, place: int = 2000) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def with_record(manifest: Manifest, number: int, field: str, value: int) -> Manifest:
    """The same data set, packed with a wrong record: its catalogue's sha256 is the manifest's."""
    records = np.load(manifest.folder / "catalogue.npy")
    records[number][field] = value
    save_catalogue(manifest.folder, [records])
    return manifest.model_copy(update={"catalogue_sha256": file_sha256(manifest.folder / "catalogue.npy")})


def told(manifest: Manifest) -> str:
    with pytest.raises(DataError) as error:
        verify(manifest, "none")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("digests", ["none", "background", "all"])
def test_a_data_set_as_it_was_packed_passes(manifest: Manifest, digests: str) -> None:
    with verify(manifest, digests) as verification:  # type: ignore[arg-type]
        verification.wait()


def in_place(spoil: Callable[[Path], object], name: str) -> Callable[[Path], object]:
    return lambda folder: spoil(folder / name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (in_place(Path.unlink, "shard-000002.tar"), "shard-000002.tar is missing; restore it"),
        (in_place(cut, "shard-000001.tar"), "shard-000001.tar has 30719 bytes, not 30720: it was changed"),
        (in_place(Path.unlink, "shard-000003.idx"), "shard-000003.idx is missing"),
        (in_place(cut, "shard-000003.idx"), "index {folder}/shard-000003.idx has another sha256"),
        (
            lambda folder: shutil.copy(folder / "shard-000000.idx", folder / "shard-000001.idx"),
            "index {folder}/shard-000001.idx has another sha256",
        ),
        (in_place(Path.unlink, "identities.parquet"), "identity table {folder}/identities.parquet is missing"),
        (
            lambda folder: IdentityTable(KEYS[::-1]).save(folder / "identities.parquet"),
            "identity table {folder}/identities.parquet changed after packing",
        ),
        (in_place(Path.unlink, "catalogue.npy"), "catalogue {folder}/catalogue.npy is missing"),
        (in_place(cut, "catalogue.npy"), "catalogue {folder}/catalogue.npy cannot be read"),
        (
            lambda folder: save_catalogue(folder, [np.load(folder / "catalogue.npy")[:-1]]),
            "catalogue {folder}/catalogue.npy does not list the manifest's 12 samples",
        ),
        (
            lambda folder: np.save(folder / "catalogue.npy", np.zeros(12, np.int64)),
            "catalogue {folder}/catalogue.npy does not list the manifest's 12 samples",
        ),
        (
            lambda folder: save_catalogue(folder, [np.load(folder / "catalogue.npy")[[1, 0, *range(2, 12)]]]),
            "catalogue {folder}/catalogue.npy has another sha256",
        ),
    ],
)
def test_a_file_that_is_missing_or_changed_is_named(
    manifest: Manifest, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(manifest.folder)
    assert message.format(folder=manifest.folder) in told(manifest)


def test_several_missing_shards_are_counted(manifest: Manifest) -> None:
    for number in (1, 3):
        (manifest.folder / f"shard-{number:06d}.tar").unlink()
    assert "shard-000001.tar is missing (and 1 more of 4)" in told(manifest)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("row", 5, "has label 5, but the identity table has 5 rows"),
        ("row", -1, "has label -1, but the identity table has 5 rows"),
        ("offset", 0, "from byte 0 on, but the tar has 30720"),
        ("offset", -512, "from byte -512 on"),
        ("offset", 30720 - 4999, "has 5000 bytes from byte 25721 on, but the tar has 30720"),
        ("offset", 2**63 - 1, "from byte 9223372036854775807 on"),
        ("size", 0, "has 0 bytes"),
        ("size", 2**32 - 1, "has 4294967295 bytes"),
    ],
)
def test_a_sample_that_cannot_be_is_named(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, field: str, value: int, message: str
) -> None:
    for chunk in (1 << 20, 5):  # records looked at together: all, or some of two shards
        monkeypatch.setattr("pipeline.data.verify.CHUNK", chunk)
        assert (line := told(with_record(manifest, 7, field, value))).count("sample 1 of shard shard-000002.tar") == 1
        assert message in line


def test_the_last_bytes_of_a_tar_may_be_a_samples(manifest: Manifest) -> None:
    verify(with_record(manifest, 7, "offset", 30720 - 5000), "none")


def test_a_flipped_byte_of_a_tar_is_found_when_digests_are_compared(manifest: Manifest) -> None:
    flip(manifest.folder / "shard-000002.tar")
    verify(manifest, "none").raise_if_broken()
    with pytest.raises(DataError, match=r"shard-000002\.tar has another sha256: it was changed"):
        verify(manifest, "all")


def test_the_background_tells_a_flipped_byte_when_asked(manifest: Manifest) -> None:
    flip(manifest.folder / "shard-000003.tar")
    with verify(manifest, "background") as verification:
        with pytest.raises(DataError, match=r"shard-000003\.tar has another sha256"):
            verification.wait()
        for _ in range(2):
            with pytest.raises(DataError, match=r"shard-000003\.tar"):
                verification.raise_if_broken()


def test_the_background_tells_a_tar_that_vanishes_while_training_runs(manifest: Manifest) -> None:
    class Vanishing(LocalStore):
        def local(self, name: str) -> Path:
            (manifest.folder / "shard-000001.tar").unlink(missing_ok=True)
            return super().local(name)

    with (
        verify(manifest, "background", Vanishing(manifest.folder)) as verification,
        pytest.raises(DataError, match=r"shard-000001\.tar is missing"),
    ):
        verification.wait()
