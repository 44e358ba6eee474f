"""What a data set looks like: a few lines of text, and a picture to see at a glance whether it is the right one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pipeline.data.catalogue import Records
from pipeline.data.manifest import Manifest
from pipeline.files import write_atomically

TEXT = "summary.txt"
PICTURE = "summary.png"
COLUMNS, LINES, TILE = 12, 3, 96  # of the contact sheet; pixels of a tile
DPI = 120
COLOUR = "#0072B2"

Ints = npt.NDArray[np.int64]


def write_summary(manifest: Manifest, shards: list[Records], sizes: npt.NDArray[np.int32]) -> None:
    """Write the text and the picture into the data set's folder.

    Args:
        manifest: of the data set; its shards stand.
        shards: records of each shard's samples.
        sizes: (N, 2) width and height of the samples.
    """
    counts = np.zeros(manifest.identities_count, np.int64)
    for records in shards:
        counts += np.bincount(records["row"], minlength=len(counts))
    write_atomically(manifest.folder / TEXT, ("\n".join(_tell(manifest, counts, sizes)) + "\n").encode())
    figure = Figure(figsize=(COLUMNS, 4 + LINES), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(4, LINES))
    _histogram(figure.add_subplot(grid[0, 0]), counts, "images per identity", "identities")
    _histogram(figure.add_subplot(grid[0, 1]), sizes.max(axis=1), "longer side in pixels", "images")
    figure.suptitle(f"{manifest.name}: {manifest.samples:,} images of {manifest.identities_count:,} identities")
    axes = figure.add_subplot(grid[1, :])
    axes.imshow(contact_sheet(manifest, shards), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title("images taken at even steps through the shards")
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(picture, dpi=DPI, format="png")
    write_atomically(manifest.folder / PICTURE, picture.getvalue())


def _tell(manifest: Manifest, counts: Ints, sizes: npt.NDArray[np.int32]) -> list[str]:
    """The lines of text."""
    total = sum(entry.bytes for entry in manifest.shards)
    lines = [
        f"{manifest.name}: {manifest.samples:,} samples of {manifest.identities_count:,} identities "
        f"in {len(manifest.shards)} shards, {total:,} bytes",
        f"  images per identity: {_quantiles(counts)}",
        f"  width in pixels: {_quantiles(sizes[:, 0])}; height: {_quantiles(sizes[:, 1])}",
    ]
    return lines + [f"  not packed: {count:,} ({reason})" for reason, count in manifest.rejects.items()]


def _quantiles(values: npt.NDArray[np.integer]) -> str:
    least, middle, most = np.quantile(values, (0, 0.5, 1), method="nearest").tolist()
    return f"{least:,} to {most:,}, half have at most {middle:,}"


def _histogram(axes: Axes, values: npt.NDArray[np.integer], what: str, of: str) -> None:
    """Few whole numbers get a bar each; many are put into 50 bins."""
    least, most = int(values.min()), int(values.max())
    bins = np.arange(least - 0.5, most + 1) if most - least < 50 else np.linspace(least, most, 51)
    axes.hist(values, bins=bins.tolist(), color=COLOUR)
    axes.set(xlabel=what, ylabel=f"{of} (logarithmic)", yscale="log")
    axes.set_ylim(bottom=0.7)  # else a bar of one has no height
    axes.grid(visible=True, axis="y", color="0.88")
    axes.set_axisbelow(True)


def contact_sheet(manifest: Manifest, shards: list[Records]) -> npt.NDArray[np.uint8]:
    """(LINES * TILE, COLUMNS * TILE, 3) of images taken at even steps through the shards."""
    starts = np.cumsum([0, *map(len, shards)])
    count = min(COLUMNS * LINES, manifest.samples)
    sheet = Image.new("RGB", (COLUMNS * TILE, LINES * TILE), "white")
    for tile, number in enumerate((np.arange(count) * manifest.samples // count).tolist()):
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        record = shards[shard][number - starts[shard]]
        raw = _read(manifest.folder / manifest.shards[shard].name, int(record["offset"]), int(record["size"]))
        with Image.open(io.BytesIO(raw)) as image:
            image.draft("RGB", (TILE, TILE))
            small = image.convert("RGB")
        small.thumbnail((TILE - 4, TILE - 4))
        line, column = divmod(tile, COLUMNS)
        sheet.paste(small, (column * TILE + (TILE - small.width) // 2, line * TILE + (TILE - small.height) // 2))
    return np.asarray(sheet)


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)
