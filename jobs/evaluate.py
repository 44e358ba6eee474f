"""Evaluate the generations that a run has trained: every pair, its criterion, gain, flips, thresholds and backfill.

python jobs/evaluate.py --config FILE key.sub=value ...           all of them, on the test set
python jobs/evaluate.py --config FILE --generations v1,v2         only these
python jobs/evaluate.py --config FILE --split validation          on the validation set

Writes report.json, report.md and pictures to runs/NAME/evaluation, or runs/NAME/evaluation-validation.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def run(arguments: argparse.Namespace) -> None:
    """Evaluate."""
    from pipeline.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    from pipeline.assessment import evaluate_run

    names = None if arguments.generations is None else tuple(arguments.generations.split(","))
    evaluate_run(config, names, arguments.split)


def main() -> int:
    """Parse the arguments and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config keys to set, values as YAML")
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--generations", metavar="NAME,...", help="which generations (default: all that are trained)")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="of the held-out images")
    arguments = parser.parse_args()

    from pipeline.job import exit_code

    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
