"""Measure the product beside its alternative.

python jobs/benchmark.py classifier --classes 1000000 --json FILE    one training step, beside the public way
python jobs/benchmark.py plot --out FILE.png FILE.json ...           cost over the number of classes
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    from pipeline.benchmarks.classifier import ClassifierBenchmark

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    classifier = commands.add_parser("classifier", help="one training step of the classifier")
    for name, field in ClassifierBenchmark.model_fields.items():
        option, described = f"--{name.replace('_', '-')}", f"{field.description} [{field.default}]"
        if field.annotation is bool:
            classifier.add_argument(
                option, action=argparse.BooleanOptionalAction, default=field.default, help=field.description
            )
        else:
            classifier.add_argument(option, default=argparse.SUPPRESS, help=described)
    classifier.add_argument("--threads", type=int, default=os.cpu_count(), help="processor threads [all cores]")
    classifier.add_argument("--json", type=Path, help="file for the result")
    plot = commands.add_parser("plot", help="cost over the number of classes")
    plot.add_argument("results", nargs="+", type=Path, metavar="FILE.json", help="results of `classifier`")
    plot.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture")
    return parser.parse_args(arguments)


def classifier(options: argparse.Namespace) -> None:
    """Measure, print and write."""
    import pydantic
    import torch
    from rich.console import Console

    from pipeline.benchmarks.classifier import ClassifierBenchmark, measure_classifier
    from pipeline.errors import ConfigError
    from pipeline.files import write_json

    given = {name: value for name, value in vars(options).items() if name in ClassifierBenchmark.model_fields}
    try:
        config = ClassifierBenchmark.model_validate(given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option} {first['input']}: {first['msg']}") from None
    torch.set_num_threads(max(1, options.threads))
    with Console(stderr=True).status("starting") as status:
        result = measure_classifier(config, status.update)
    result["command"] = " ".join(["python", "jobs/benchmark.py", *sys.argv[1:]])
    print(table(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, result)


def table(result: dict[str, Any]) -> str:
    """The figures in a few lines."""
    lines = [f"{'':<10}{'step':>10}{'forward':>10}{'backward':>10}{'update':>10}{'extra memory':>15}"]
    for name in result["step_ms"]:
        times = "".join(
            f"{result[key][name]:>7.0f} ms" for key in ("step_ms", "forward_ms", "backward_ms", "update_ms")
        )
        lines.append(f"{name:<10}{times}{result['extra_bytes'][name] / 1e6:>12,.0f} MB")
    lines.append(
        f"weights {result['weight_bytes'] / 1e6:,.0f} MB; a parent costs {result['parent_over_new']:.2f} of a step"
    )
    if result["ratio_step"] is not None:
        lines.append(f"of eager's time {result['ratio_step']:.3f}, of its extra memory {result['ratio_extra']:.4f}")
    lines.append(
        f"extra memory {result['extra_over_weights']:.1%} of the weights; "
        f"{result['flops_per_s'] / 1e9:,.0f} GFLOP/s, {result['fraction_of_matmul']:.0%} of a large matrix product; "
        f"{result['bytes_per_s'] / 1e9:,.1f} GB/s, {result['fraction_of_copy']:.0%} of a large copy"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code."""
    options = parse(arguments)
    from pipeline.errors import PipelineError

    try:
        if options.command == "classifier":
            classifier(options)
        else:
            from pipeline.benchmarks.plot import plot_cost

            plot_cost(options.results, options.out)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
