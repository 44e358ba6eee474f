"""Import an old model of which only embeddings are left, so that new ones can be held to it and measured against it.

python jobs/import_generation.py --name v0 --config FILE --train EMBEDDINGS.parquet --test EMBEDDINGS.parquet
python jobs/import_generation.py --name v0 --family FAMILY --train EMBEDDINGS.parquet

--train has the columns `identity` (string) and `vector` (list of floats), --test `key` (of the test set's samples) and
`vector`. The generation lies in runs/FAMILY/generations/NAME; run again, the job completes what is missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def run(arguments: argparse.Namespace) -> None:
    """Import, and print what came of it."""
    from pipeline.config import default_home, load_config

    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    from pipeline.embedding_files import EmbeddingFile
    from pipeline.importing import Import, import_generation
    from pipeline.registry_opening import open_registry

    registry, home = open_registry(config, arguments.family), config.home if config else default_home()
    test = None if arguments.test is None else EmbeddingFile(arguments.test)
    source = Import(arguments.name, EmbeddingFile(arguments.train), test, arguments.scale)
    generation = import_generation(source, registry, home)
    record = generation.record
    print(f"{record.name}: {record.identities:,} identities, {record.embedding_dim} dimensions, at {generation.path}")


def main() -> int:
    """Parse the arguments and import."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config keys to set, values as YAML")
    parser.add_argument("--name", required=True, help="of the generation")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--family", help="of the generation, at the default home (BCT_HOME)")
    where.add_argument("--config", type=Path, help="YAML file of the run: its name is the family, its home the place")
    parser.add_argument("--train", type=Path, required=True, metavar="PARQUET", help="vectors of known identities")
    parser.add_argument("--test", type=Path, metavar="PARQUET", help="vectors of the test images; none: no evaluation")
    parser.add_argument("--scale", type=float, default=20.0, help="factor on the cosines in the loss (default: 20)")
    arguments = parser.parse_args()
    if arguments.family is not None and arguments.overrides:
        parser.error("overrides are of a --config; leave them out with --family")

    from pipeline.job import exit_code

    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
