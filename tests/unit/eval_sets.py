"""What the tests of evaluation sets share: small pictures, and reading a source as packing does."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.protocols import EvaluationSource, load_protocol, save_protocol
from pipeline.data.sources import Sample, Source
from pipeline.data.spool import (
    REJECTS,
    SAMPLES,
    ReadConfig,
    read_columns,
    read_spooled,
    rejects_path,
    samples_path,
    spool_part,
)


def encode(number: int) -> bytes:
    """A JPEG of noise, different for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(raw)
    return raw


def samples_of(source: Source, spool: Path) -> dict[str, Sample]:
    """All samples by key, through pickle (as a worker gets the source) and packing's spool; none may be rejected."""
    there: Source = pickle.loads(pickle.dumps(source))
    assert there.fingerprint() == source.fingerprint()
    assert source.min_images == 1
    found: list[Sample] = []
    for number, part in enumerate(there.parts()):
        path = spool / f"{number}"
        spool_part(there, part, path, ReadConfig(min_size=1), 0)
        assert not len(read_columns([rejects_path(path)], REJECTS))
        columns = read_columns([samples_path(path)], SAMPLES)
        spans = zip(*(columns[field].to_pylist() for field in ("offset", "about", "image")), strict=True)
        found += read_spooled([path], [0] * len(columns), spans)
    assert len({sample.key for sample in found}) == len(found), "each key once"
    if isinstance(source, EvaluationSource):
        source.protocol().require(sample.key for sample in found)
        save_protocol(spool, source.protocol())
        for name, table in load_protocol(spool).tables.items():
            assert table.equals(source.protocol().tables[name]), "the tables outlive the disk"
    return {sample.key: sample for sample in found}
