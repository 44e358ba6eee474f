"""Train the generations of a family that are not trained yet, evaluate them, and register them.

python jobs/train_bct.py                                    configs/quickstart.yaml
python jobs/train_bct.py --config FILE key.sub=value ...    another config, with overrides
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config keys to set, values as YAML")
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="YAML file (default: configs/quickstart.yaml)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--fresh", action="store_true", help="start over: forget what earlier runs of this name left")
    arguments = parser.parse_args()

    from pipeline.config import load_config
    from pipeline.errors import PipelineError

    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(config.to_yaml(), end="")
            return 0
        from pipeline.run import run

        run(config, fresh=arguments.fresh)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
