"""Pictures of benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Results of `jobs/benchmark.py classifier`, by rising number of classes.

    Raises:
        ConfigError: a file is none.
    """
    results = []
    for path in paths:
        try:
            result = json.loads(path.read_text())
            results.append(
                {key: result[key] for key in ("classes", "step_ms", "extra_bytes", "dim", "batch", "machine")}
            )
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} is no result of jobs/benchmark.py classifier; write one with --json") from None
    return sorted(results, key=lambda result: int(result["classes"]))


def plot_cost(paths: Sequence[Path], target: Path) -> None:
    """Milliseconds a step and memory beyond weights and momentum over the number of classes, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    results = read_results(paths)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name in sorted({name for result in results for name in result["step_ms"]}):
        own = [result for result in results if name in result["step_ms"]]
        classes = [result["classes"] for result in own]
        left.plot(classes, [result["step_ms"][name] for result in own], "o-", label=name)
        right.plot(classes, [result["extra_bytes"][name] / 1e6 for result in own], "o-", label=name)
    left.set(title="one training step", xlabel="identities", ylabel="milliseconds")
    right.set(title="memory beyond weights and momentum", xlabel="identities", ylabel="MB")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    first = results[0]
    figure.suptitle(f"D = {first['dim']}, batch {first['batch']}, {first['machine']['device']}", fontsize=10)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)
