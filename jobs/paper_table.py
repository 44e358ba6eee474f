"""Train the grid of the paper's tables, measure it, and write the results; what is done already is left alone.

python jobs/paper_table.py                                  configs/paper_table.yaml, to docs/RESULTS.md
python jobs/paper_table.py --config FILE --markdown FILE --json FILE run.key=value cells.NAME.key=value ...
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(arguments: argparse.Namespace) -> None:
    """Do all of the grid that is not done."""
    from pipeline.console import say
    from pipeline.table.build import build
    from pipeline.table.grid import load_grid

    command = shlex.join(["python", "jobs/paper_table.py", *sys.argv[1:]])
    grid = load_grid(arguments.config, arguments.overrides)
    build(grid, arguments.markdown, arguments.json, grid.heading(command), arguments.partial)
    say(f"results      {arguments.markdown}, {arguments.json}")


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="keys to set, values as YAML")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "paper_table.yaml", help="the grid")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs" / "RESULTS.md", help="tables for people")
    parser.add_argument("--partial", action="store_true", help="train nothing: write what is there so far")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results.json", help="every figure")
    arguments = parser.parse_args()

    from pipeline.job import exit_code

    return exit_code(lambda: run(arguments), "run the same command again to go on")


if __name__ == "__main__":
    sys.exit(main())
