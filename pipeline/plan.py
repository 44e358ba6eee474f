"""What the driver hands to the workers that train one generation."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.generation import GenerationRecord


@dataclass(frozen=True)
class Plan:
    """All that a worker needs; paths are absolute and shared by all nodes. `data` may be a URL."""

    config: RunConfig
    record: GenerationRecord
    data: str
    identities: Path
    checkpoints: Path
    quarantine: Path
    destination: Path
    parents: tuple[Path, ...]
    tracking_uri: str
    run_id: str
