"""Measure the product beside its alternatives.

python jobs/benchmark.py classifier --classes 1000000 --json FILE    a training step of the classifier
python jobs/benchmark.py loader --augment full --json FILE           images a second
python jobs/benchmark.py evaluation --task search --json FILE        seconds of an evaluation, 1:1 or 1:N
python jobs/benchmark.py embed --backbone iresnet50 --json FILE      images a second of jobs/embed.py
python jobs/benchmark.py backfill --gallery OLD --vectors NEW --queries FOLDER --json FILE    rank-1 while it moves
python jobs/benchmark.py checkpoint --json FILE                     stall, resume and re-sharding
python jobs/benchmark.py step --json FILE                           what Ray, loader and tracking add to a step
python jobs/benchmark.py scaling --json FILE                        a training step of 1, 2, 4 processes
python jobs/benchmark.py plot --out FILE.png FILE.json ...           a picture of results
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

Measure = Callable[[Any, Callable[[str], None]], dict[str, Any]]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    from pipeline.benchmarks.backfill import BackfillBenchmark, measure_backfill
    from pipeline.benchmarks.checkpoint import CheckpointBenchmark, measure_checkpoint
    from pipeline.benchmarks.classifier import ClassifierBenchmark, measure_classifier
    from pipeline.benchmarks.embed import EmbedBenchmark, measure_embed
    from pipeline.benchmarks.evaluation import EvaluationBenchmark, measure_evaluation
    from pipeline.benchmarks.loader import LoaderBenchmark, measure_loader
    from pipeline.benchmarks.scaling import ScalingBenchmark, measure_scaling
    from pipeline.benchmarks.step import StepBenchmark, measure_step

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text, model, measure in (
        ("classifier", "a training step of the classifier", ClassifierBenchmark, measure_classifier),
        ("loader", "images a second", LoaderBenchmark, measure_loader),
        ("evaluation", "seconds of an evaluation", EvaluationBenchmark, measure_evaluation),
        ("embed", "images a second of embedding", EmbedBenchmark, measure_embed),
        ("backfill", "rank-1 while a gallery moves", BackfillBenchmark, measure_backfill),
        ("step", "what Ray, loader and tracking add to a step", StepBenchmark, measure_step),
        ("checkpoint", "saving and re-sharding of a classifier", CheckpointBenchmark, measure_checkpoint),
        ("scaling", "a training step of 1, 2, 4 processes", ScalingBenchmark, measure_scaling),
    ):
        command = commands.add_parser(name, help=help_text)
        for key, field in model.model_fields.items():
            option, described = f"--{key.replace('_', '-')}", f"{field.description} [{field.default}]"
            if field.annotation is bool:
                how = {"action": argparse.BooleanOptionalAction, "default": field.default, "help": field.description}
                command.add_argument(option, **how)
            else:
                command.add_argument(option, default=argparse.SUPPRESS, help=described)
        command.add_argument("--json", type=Path, help="file for the result")
        command.set_defaults(model=model, measure=measure)
    plot = commands.add_parser("plot", help="a picture of results")
    plot.add_argument("results", nargs="+", type=Path, metavar="FILE.json", help="results of one benchmark")
    plot.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> None:
    """Measure, print and write."""
    import pydantic
    from rich.console import Console

    from pipeline.benchmarks.report import as_text
    from pipeline.files import write_json
    from pipeline.mistakes import option_mistake

    given = {name: value for name, value in vars(options).items() if name in options.model.model_fields}
    try:
        config = options.model.model_validate(given)
    except pydantic.ValidationError as error:
        raise option_mistake(error) from None
    with Console(stderr=True).status("starting") as status:
        result = options.measure(config, status.update)
    result["command"] = " ".join(["python", "jobs/benchmark.py", *sys.argv[1:]])
    print(as_text(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code."""
    options = parse(arguments)
    from pipeline.errors import PipelineError

    try:
        if options.command != "plot":
            measure(options)
        else:
            from pipeline.benchmarks.plot import plot_results

            plot_results(options.results, options.out)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
