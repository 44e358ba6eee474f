"""Let a generation serve, if it passes the gates; or return to the one that served before.

python jobs/promote.py --config FILE key.sub=value ...           the candidate
python jobs/promote.py --config FILE --generation v2             this one
python jobs/promote.py --config FILE --rollback                  the one that served before

Gates: the criterion holds against every generation that still has gallery vectors (those of --gallery and --live; left
out: of the generation that serves, and of those whose vectors its galleries hold); the self-test is not worse than that
of the generation that serves; the artefact is as it was registered, and gives what it gave. A refusal exits with 3.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def run(arguments: argparse.Namespace) -> None:
    """Promote, roll back or unlock."""
    from pipeline.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    from pipeline.promotion import promoting
    from pipeline.registry_opening import open_registry

    registry = open_registry(config)
    names = tuple(arguments.live.split(",")) if arguments.live else ()
    galleries = promoting.Galleries(tuple(arguments.gallery), names)
    if arguments.unlock:
        promoting.unlock(registry)
    elif arguments.rollback:
        promoting.rollback(registry, galleries)
    else:
        promoting.promote(registry, arguments.generation, config.evaluation.judged, galleries, arguments.margin)


def main() -> int:
    """Parse the arguments and promote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config keys to set, values as YAML")
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--generation", metavar="NAME", help="which (default: the candidate)")
    what.add_argument("--rollback", action="store_true", help="return to the generation that served before")
    what.add_argument("--unlock", action="store_true", help="remove the lock that a killed promotion has left")
    parser.add_argument("--gallery", type=Path, action="append", default=[], help="a file or folder of stamped vectors")
    parser.add_argument("--live", metavar="NAME,...", help="generations that still have gallery vectors")
    parser.add_argument("--margin", type=float, default=0.5, help="points that the self-test may lose (default: 0.5)")
    arguments = parser.parse_args()

    from pipeline.job import exit_code

    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
