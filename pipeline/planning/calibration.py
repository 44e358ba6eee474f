"""How fast the machine is: from a benchmark of it, or assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.files import parse_json
from pipeline.planning.config import PlanConfig

# Without a benchmark: an NVIDIA A100 80 GB by its data sheet (dense, without TF32), and shares that are assumed.
ASSUMED_MATMUL_FLOPS = {"bf16": 312e12, "fp32": 19.5e12}
ASSUMED_COPY_BYTES = 2.0e12
ASSUMED_FRACTION = 0.5
# InsightFace, arcface_torch/docs/speed_benchmark.md: 3M identities, 8 V100 (125 TFLOP/s), batch 1024, D 512. All rows
# take 1024 / 2271 s a step, a tenth of them 1024 / 5300 s: the rest of the rows run at 5.5 TFLOP/s.
ASSUMED_EAGER_FRACTION = 0.044


@dataclass(frozen=True)
class Rates:
    """Speeds of one GPU.

    Attributes:
        source: where they come from, for people.
        matmul_flops: FLOP/s of a large matrix product.
        fraction_of_matmul: share of it that the classifier reaches.
        copy_bytes: bytes/s of memory traffic.
        batch: of the benchmark, whose step included the update of the rows; None without one.
        dim: of the benchmark.
        extra_bytes: the benchmark's memory beyond rows and optimiser, at its batch; None where not known.
    """

    source: str
    matmul_flops: float
    fraction_of_matmul: float
    copy_bytes: float
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
    return Rates(
        source="not calibrated: an A100's data sheet, and assumed shares of it; measure with --benchmark FILE",
        matmul_flops=ASSUMED_MATMUL_FLOPS[config.precision],
        fraction_of_matmul=ASSUMED_FRACTION if config.implementation == "ours" else ASSUMED_EAGER_FRACTION,
        copy_bytes=ASSUMED_COPY_BYTES,
    )


def benchmark_rates(path: Path, config: PlanConfig) -> Rates:
    """Rates from the JSON file of `jobs/benchmark.py classifier`.

    Raises:
        ConfigError: the file cannot be read, lacks a key, or measured something that tells nothing of this plan.
    """
    document = _read(path)
    if document.get("parents") or document.get("sample_rate", 1) != 1:
        raise ConfigError(f"{path}: measured with parents or a sample rate below 1: measure it without either")
    common = {
        "matmul_flops": _number(document, "ceilings.matmul_flops", path),
        "copy_bytes": _number(document, "ceilings.copy_bytes", path),
        "batch": _number(document, "batch", path),
        "dim": _number(document, "dim", path),
    }
    if config.implementation == "eager":
        flops = 8 * common["batch"] * common["dim"] * _number(document, "classes", path)
        reached = flops / (_number(document, "step_ms.eager", path) / 1e3)
        return Rates(
            _source(path, document, "eager", config), fraction_of_matmul=reached / common["matmul_flops"], **common
        )
    name = document.get("implementation")
    if name not in ("blocked", "triton"):
        raise ConfigError(f"{path}: implementation is {name!r}, the plan is of ours: measure 'blocked' or 'triton'")
    return Rates(
        _source(path, document, name, config),
        fraction_of_matmul=_number(document, "fraction_of_matmul", path),
        extra_bytes=_number(document, f"extra_bytes.{name}", path),
        **common,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = parse_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--benchmark {path}: {error.strerror or error}") from None
    except ValueError:
        raise ConfigError(f"--benchmark {path} is not JSON: give the file that jobs/benchmark.py wrote") from None
    if not isinstance(document, dict):
        raise ConfigError(f"--benchmark {path} is not a benchmark: give the file that jobs/benchmark.py wrote")
    return document


def _number(document: dict[str, Any], key: str, path: Path) -> float:
    """Look up a positive number by its dotted key."""
    value: Any = document
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        what = "is missing" if value is None else f"is {value!r}, not a positive number"
        raise ConfigError(f"{path}: {key} {what}: measure again with jobs/benchmark.py classifier")
    return float(value)


def _source(path: Path, document: dict[str, Any], name: str, config: PlanConfig) -> str:
    device, precision = document.get("device"), document.get("precision")
    other = "" if precision == config.precision else f"; the plan is for {config.precision}"
    return f"calibrated by {path}: {name} on {device} in {precision}{other}"
