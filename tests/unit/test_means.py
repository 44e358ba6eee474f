"""Class means against a loop, and the images that they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.compat.means import class_means
from pipeline.data.loader import iterate_identities
from pipeline.data.preprocess import PreprocessConfig
from pipeline.errors import DataError
from pipeline.identities import IdentityTable
from tests.unit.test_loader import KEYS, SHARD_SIZES, DataSet, encode, pack, random_image

PREPROCESS = PreprocessConfig(size=31, resize=40)
# The run's table: another order than the data set's, and some of its identities left out.
TABLE = IdentityTable(("id-7", "id-0", "id-4", "id-8", "id-2"))
ROWS, DIM = 7, 5


def backbone() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, DIM)).eval()


def drawn(rows: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(len(rows), 1, 3, 4, generator=generator) * 3, torch.tensor(rows)


def test_class_means_are_those_of_a_loop() -> None:
    images, rows = drawn([5, 2, 2, 6, 5, 5, 2, 5, 6, 2, 5])  # rows 3 and 4 have no image
    batches = list(zip(images.split(4), rows.split(4), strict=True))
    means = class_means(backbone(), batches, 2, ROWS, DIM)
    assert means.shape == (ROWS - 2, DIM)
    assert means.dtype == torch.float32
    features = backbone()(images).detach().double()
    for row in range(2, ROWS):
        own = [feature / feature.norm() for feature, label in zip(features, rows.tolist(), strict=True) if label == row]
        wanted = sum(own, torch.zeros(DIM, dtype=torch.float64)) / max(len(own), 1)
        torch.testing.assert_close(means[row - 2].double(), wanted, rtol=1e-6, atol=1e-7)
    assert means[1:3].abs().max() == 0
    assert means.norm(dim=1).max() <= 1


def test_one_images_mean_has_length_one_and_several_less() -> None:
    images, rows = drawn([0, 1, 1])
    length = class_means(backbone(), [(images, rows)], 0, 2, DIM).norm(dim=1)
    assert length[0].item() == pytest.approx(1, abs=1e-6)
    assert length[1].item() < 0.999


def test_a_rank_without_rows_has_no_means() -> None:
    assert class_means(backbone(), [], 4, 4, DIM).shape == (0, DIM)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    rng = np.random.default_rng(5)
    pixels = [random_image(rng, 40, 40) for _ in range(sum(SHARD_SIZES))]
    return pack(tmp_path_factory.mktemp("means"), pixels, [encode(image) for image in pixels])


@pytest.mark.parametrize(("first_row", "end_row"), [(0, 5), (1, 3), (4, 5), (2, 2)])
def test_each_image_of_the_identities_comes_once_with_its_row(data: DataSet, first_row: int, end_row: int) -> None:
    batches = list(iterate_identities(data.folder, data.manifest, TABLE, first_row, end_row, PREPROCESS, 4))
    wanted = [
        (TABLE.row_of_key[key], picture[4:35, 4:35].astype(np.float32))
        for key, picture in zip(data.identities, data.pixels, strict=True)
        if first_row <= TABLE.row_of_key.get(key, -1) < end_row
    ]
    assert len(wanted) == sum(data.identities.count(key) for key in TABLE.keys[first_row:end_row])
    assert [len(rows) for _, rows in batches] == [min(4, len(wanted) - n) for n in range(0, len(wanted), 4)]
    assert [row for _, rows in batches for row in rows.tolist()] == [row for row, _ in wanted]
    pictures = [picture for images, _ in batches for picture in images[:, 0].numpy()]
    for picture, (_, pixels) in zip(pictures, wanted, strict=True):
        assert np.abs(picture - (pixels - 127.5) / 127.5).max() < 1e-6


def test_ranks_together_see_what_one_sees(data: DataSet) -> None:
    def rows_of(first_row: int, end_row: int) -> list[int]:
        found = iterate_identities(data.folder, data.manifest, TABLE, first_row, end_row, PREPROCESS, 3)
        return [row for _, rows in found for row in rows.tolist()]

    assert sorted(rows_of(0, 2) + rows_of(2, 4) + rows_of(4, 5)) == sorted(rows_of(0, 5))


def test_identity_that_the_data_set_lacks_is_named(data: DataSet) -> None:
    table = IdentityTable((*KEYS[:2], "id-none"))
    with pytest.raises(DataError, match="1 identities of the run are not in the data set, such as 'id-none'"):
        next(iter(iterate_identities(data.folder, data.manifest, table, 0, 3, PREPROCESS, 4)))


def test_image_that_does_not_decode_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    pixels = [random_image(rng, 40, 40) for _ in range(sum(SHARD_SIZES))]
    files = [encode(image) for image in pixels]
    files[14] = files[14][:60]
    broken = pack(tmp_path, pixels, files)
    table = IdentityTable((broken.identities[14],))
    with pytest.raises(DataError, match=r"sample 's0014.png' of shard shard-00001\.tar does not decode"):
        list(iterate_identities(broken.folder, broken.manifest, table, 0, 1, PREPROCESS, 4))
