"""What the driver hands to the workers that train one generation."""

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.generation import RECORD, GenerationRecord


@dataclass(frozen=True)
class Plan:
    """All that a worker needs; paths are absolute and shared by all nodes. `data` and `checkpoints` may be URLs.

    Ray Train shows what a worker is given on its dashboard, as `repr` tells it: a URI, which may hold a password, is
    left out.
    """

    config: RunConfig
    record: GenerationRecord
    data: str
    identities: Path
    checkpoints: str
    quarantine: Path
    journal: Path
    destination: Path
    parents: tuple[Path, ...]
    tracking_uri: str = field(repr=False)
    run_id: str

    @property
    def sealed(self) -> bool:
        """Whether it is done: a group of workers that replaces a lost one finds the first artefacts there."""
        return (self.destination / RECORD).is_file()
