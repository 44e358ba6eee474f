"""Train the generations of a family that are not trained yet, evaluate them, and register them.

python jobs/train_bct.py                                    configs/quickstart.yaml
python jobs/train_bct.py --config FILE key.sub=value ...    another config, with overrides
torchrun --nproc-per-node 2 jobs/train_bct.py ...           on torchrun's processes, without Ray

Exit code 75: it was stopped (SIGTERM, or too few nodes were left), and the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def train(arguments: argparse.Namespace) -> None:
    """Run, or print the config."""
    from pipeline.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from pipeline.workers.config import THREADS

        os.environ.update(THREADS)
        from pipeline.workers.torchrun import run_rank

        run_rank(config, arguments.fresh)
        return
    from pipeline.run import run

    run(config, arguments.fresh)


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config keys to set, values as YAML")
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="YAML file (default: configs/quickstart.yaml)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--fresh", action="store_true", help="start over: forget what earlier runs of this name left")
    arguments = parser.parse_args()

    from pipeline.job import exit_code

    return exit_code(lambda: train(arguments), "run the same command again to go on")


if __name__ == "__main__":
    sys.exit(main())
