"""Embed a gallery again, bit by bit, while it is searched: what pays first comes first.

python jobs/backfill.py --gallery FOLDER --vectors FOLDER                       most easily confused items first
python jobs/backfill.py --gallery FOLDER --vectors FOLDER --order traffic --traffic COUNTS.csv
python jobs/backfill.py --gallery FOLDER --vectors FOLDER --until 0.5           stop half way; run again to go on
python jobs/backfill.py --gallery FOLDER --vectors FOLDER --queries FILE        with rank-1 after each batch
python jobs/backfill.py --gallery FOLDER --rollback                             undo it
python jobs/backfill.py --gallery FOLDER --prune                                keep it, and delete what it replaced

Killed at any moment, it leaves a gallery that holds every key once; run again, it goes on. The accuracy so far is in
GALLERY/backfill.json and backfill.png. Verdicts: as jobs/search.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.backfill.moving import BackfillConfig


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--gallery", type=Path, required=True, metavar="FOLDER", help="of jobs/search.py build")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--vectors", type=Path, metavar="PLACE", help="file or folder of the new generation's vectors")
    what.add_argument("--rollback", action="store_true", help="undo the backfill that is open")
    what.add_argument("--prune", action="store_true", help="close it: delete what it replaced; no way back")
    parser.add_argument("--order", help="uncertainty, traffic or random [uncertainty]")
    parser.add_argument("--traffic", type=Path, metavar="FILE", help="CSV or Parquet of key and count")
    parser.add_argument("--seed", help="of the random order [0]")
    parser.add_argument("--batch", help="keys swapped at a time [a twentieth of the gallery]")
    parser.add_argument("--until", metavar="SHARE", help="of the gallery, where to stop [1]")
    parser.add_argument("--queries", type=Path, metavar="PLACE", help="vectors of the new generation with identities")
    parser.add_argument("--verdicts", type=Path, metavar="FILE", help="JSON list of verdicts, not the registry's")
    parser.add_argument("--config", type=Path, help="YAML file of a run: where the registry is")
    options = parser.parse_args(arguments)
    if "vectors" not in options and (others := set(vars(options)) - {"gallery", "rollback", "prune"}):
        parser.error(f"--{min(others)} goes with --vectors")
    return options


def backfill_config(options: argparse.Namespace) -> BackfillConfig:
    """How the gallery is embedded again.

    Raises:
        ConfigError: an option is out of its range, or two do not go together.
    """
    import pydantic

    from pipeline.backfill.moving import BackfillConfig
    from pipeline.mistakes import option_mistake

    given = {name: value for name, value in vars(options).items() if name in BackfillConfig.model_fields}
    try:
        return BackfillConfig(**given)
    except pydantic.ValidationError as error:
        raise option_mistake(error) from None


def run(options: argparse.Namespace) -> None:
    """Do what the options ask for."""
    from pipeline.backfill.moving import StoredVectors, backfill, prune, roll_back

    if "vectors" not in options:
        (roll_back if "rollback" in options else prune)(options.gallery)
        return
    config = backfill_config(options)
    from pipeline.recorded_verdicts import recorded_verdicts
    from pipeline.vectors import read_vectors, vector_files

    source = StoredVectors.read(options.vectors)
    queries = read_vectors(vector_files(options.queries)) if "queries" in options else None
    file, run_config = getattr(options, "verdicts", None), getattr(options, "config", None)
    backfill(options.gallery, source, config, recorded_verdicts(file, run_config, source.stamp.family), queries)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code."""
    options = parse(arguments)
    from pipeline.job import exit_code

    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
