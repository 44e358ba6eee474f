"""How fast the machine is: from a benchmark of it, or assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.files import parse_json
from pipeline.planning.config import PlanConfig


@dataclass(frozen=True)
class Rates:
    """Speeds of one GPU.

    Attributes:
        source: where they come from, for people.
        matmul_flops: FLOP/s of a large matrix product.
        fraction_of_matmul: share of it that the classifier reaches.
        copy_bytes: bytes/s of memory traffic.
        backbone_fraction: share of the product's FLOP/s that the backbone reaches.
        eager_row_bytes: of public code's sampling, a row of the rank.
        batch: of the benchmark, whose step included the update of the rows; None without one.
        dim: of the benchmark.
        extra_bytes: the benchmark's memory beyond rows and optimiser, at its batch; None where not known.
    """

    source: str
    matmul_flops: float
    fraction_of_matmul: float
    copy_bytes: float
    backbone_fraction: float
    eager_row_bytes: float
    batch: float | None = None
    dim: float | None = None
    extra_bytes: float | None = None

    @property
    def calibrated(self) -> bool:
        """Whether they were measured."""
        return self.batch is not None

    @property
    def classifier_flops(self) -> float:
        """FLOP/s of the classifier."""
        return self.matmul_flops * self.fraction_of_matmul


def assumed_rates(config: PlanConfig) -> Rates:
    """Return rates for where nothing was measured."""
    profile = config.profile
    return Rates(
        source=f"not calibrated: {profile.source}; measure with --benchmark FILE",
        matmul_flops=profile.matmul_flops[config.precision],
        fraction_of_matmul=profile.tiles_fraction if config.implementation == "ours" else profile.eager_fraction,
        copy_bytes=profile.copy_bytes,
        backbone_fraction=_backbone_fraction(config),
        eager_row_bytes=profile.eager_row_bytes,
    )


def _backbone_fraction(config: PlanConfig) -> float:
    given = config.backbone_efficiency
    return config.profile.backbone_fraction if given is None else given


def benchmark_rates(path: Path, config: PlanConfig) -> Rates:
    """Rates from the JSON file of `jobs/benchmark.py classifier`.

    Raises:
        ConfigError: the file cannot be read, lacks a key, or measured something that tells nothing of this plan.
    """
    document = read("--benchmark", path)
    if document.get("parents") or document.get("sample_rate", 1) != 1:
        raise ConfigError(f"{path}: measured with parents or a sample rate below 1: measure it without either")
    common = {
        "matmul_flops": number(document, "ceilings.matmul_flops", path),
        "copy_bytes": number(document, "ceilings.copy_bytes", path),
        "batch": number(document, "batch", path),
        "dim": number(document, "dim", path),
        "backbone_fraction": _backbone_fraction(config),
        "eager_row_bytes": config.profile.eager_row_bytes,
    }
    if config.implementation == "eager":
        flops = 8 * common["batch"] * common["dim"] * number(document, "classes", path)
        reached = flops / (number(document, "step_ms.eager", path) / 1e3)
        return Rates(
            _source(path, document, "eager", config), fraction_of_matmul=reached / common["matmul_flops"], **common
        )
    name = document.get("implementation")
    if name not in ("blocked", "triton"):
        raise ConfigError(f"{path}: implementation is {name!r}, the plan is of ours: measure 'blocked' or 'triton'")
    return Rates(
        _source(path, document, name, config),
        fraction_of_matmul=number(document, "fraction_of_matmul", path),
        extra_bytes=number(document, f"extra_bytes.{name}", path),
        **common,
    )


def read(option: str, path: Path) -> dict[str, Any]:
    """What a benchmark wrote.

    Raises:
        ConfigError: it is not that.
    """
    try:
        document = parse_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror or error}") from None
    except ValueError:
        raise ConfigError(f"{option} {path} is not JSON: give the file that jobs/benchmark.py wrote") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{option} {path} is not a benchmark: give the file that jobs/benchmark.py wrote")
    return document


def number(document: dict[str, Any], key: str, path: Path, benchmark: str = "classifier") -> float:
    """Look up a positive number by its dotted key.

    Raises:
        ConfigError: there is none.
    """
    value: Any = document
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        what = "is missing" if value is None else f"is {value!r}, not a positive number"
        raise ConfigError(f"{path}: {key} {what}: measure again with jobs/benchmark.py {benchmark}")
    return float(value)


def _source(path: Path, document: dict[str, Any], name: str, config: PlanConfig) -> str:
    device, precision = document.get("device"), document.get("precision")
    other = "" if precision == config.precision else f"; the plan is for {config.precision}"
    return f"calibrated by {path}: {name} on {device} in {precision}{other}"
