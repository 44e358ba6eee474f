"""A family of three real, tiny, untrained generations in a real registry, and reports on it made by hand."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.bootstrap import Estimate
from pipeline.evaluation.lineage import Lineage
from pipeline.evaluation.measurement import Measured, Measurements
from pipeline.evaluation.report import build_report
from pipeline.evaluation.settings import EvaluationConfig
from pipeline.generation import Generation
from pipeline.registry import RegisteredGeneration, Registry
from pipeline.registry_evaluation import record_evaluation
from tests.unit.test_registry import make_generation, start
from tests.unit.test_report import MATRIX, by_hand

CONFIG = EvaluationConfig(bootstrap=3)  # rank1 and tar@1e-3
DATA = "e" * 64
GOOD: Mapping[str, tuple[float, float]] = {
    "v1/v1": (0.20, 0.10),
    "v2/v1": (0.25, 0.12),
    "v2/v2": (0.30, 0.15),
    "v3/v1": (0.28, 0.13),
    "v3/v2": (0.35, 0.18),
    "v3/v3": (0.40, 0.20),
}
"""Every generation is compatible with all its ancestors."""


def report_of(matrix: Mapping[str, tuple[float, float]], lineage: Lineage, spread: float = 0.01) -> dict[str, Any]:
    """As an evaluation would write it; the replicates of cross-tests lie `spread` below, at and above the value."""
    pairs = {}
    for label, values in matrix.items():
        query, gallery = label.split("/")
        around = spread * np.array([-1.0, 0.0, 1.0]) * (query != gallery)
        metrics = {
            name: Estimate(value, value + around) for name, value in zip(CONFIG.metric_names, values, strict=True)
        }
        pairs[label] = Measured(query, gallery, metrics, None, {}, {}, None)
    made = build_report(Measurements(pairs, by_hand(MATRIX).images), lineage, CONFIG)
    report: dict[str, Any] = json.loads(json.dumps(made, allow_nan=False))
    return report


@dataclass(frozen=True)
class Family:
    """v1; v2 of v1; v3 of v1 and v2."""

    registry: Registry
    generations: dict[str, Generation]

    @classmethod
    def make(cls, registry: Registry, folder: Path) -> "Family":
        generations: dict[str, Generation] = {}
        known: dict[str, RegisteredGeneration] = {}
        for seed, (name, parents) in enumerate({"v1": (), "v2": ("v1",), "v3": ("v1", "v2")}.items()):
            digests = {parent: generations[parent].digest for parent in parents}
            generations[name] = make_generation(folder, name, digests, seed=seed)
            run_id = start(registry, name, tuple(known[parent] for parent in parents))
            known[name] = registry.register(run_id, generations[name], {})
            registry.finish_run(run_id)
        return cls(registry, generations)

    def report(self, names: tuple[str, ...] = ("v1", "v2", "v3"), **other: tuple[float, float]) -> dict[str, Any]:
        """Of some of them; `v3_v1=(0.1, 0.1)` is another figure."""
        matrix = {**GOOD, **{pair.replace("_", "/"): values for pair, values in other.items()}}
        parents = {name: tuple(self.generations[name].record.parents) for name in names}
        shown = {pair: values for pair, values in matrix.items() if set(pair.split("/")) <= set(names)}
        return report_of(shown, Lineage(names, parents, {}))

    def record(
        self, names: tuple[str, ...] = ("v1", "v2", "v3"), data: str = DATA, **other: tuple[float, float]
    ) -> dict[str, Any]:
        """Tell the registry of an evaluation; returns its report."""
        report = self.report(names, **other)
        record_evaluation(self.registry, {name: self.generations[name] for name in names}, report, data)
        return report
