"""What `jobs/benchmark.py scaling` measured, for the planner."""

from __future__ import annotations

from pathlib import Path

from pipeline.planning.calibration import number, read


def measured_links(path: Path) -> dict[str, float]:
    """Latency (microseconds) and bandwidth (GB/s) within a node, as fields of `PlanConfig`.

    Raises:
        ConfigError: the file cannot be read or lacks them.
    """
    document = read("--scaling", path)
    return {key: number(document, f"links.{key}", path, "scaling") for key in ("latency", "bandwidth")}
