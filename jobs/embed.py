"""Embed images with a registered generation: stamped vectors in Parquet, a file a shard or block of the list.

python jobs/embed.py --config FILE --generation v2 --data SHARDS --out FOLDER       a packed data set, or its URL
python jobs/embed.py --family NAME --generation v2 --list FILE.csv --out FOLDER     a list of images: .csv or .parquet
python jobs/embed.py --artefact FOLDER --images FOLDER --out FOLDER                 a folder with one a identity

Run again, it goes on with what is missing. OUT/_embed.json says what the vectors are of, and which images have none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.embed import EmbedConfig
    from pipeline.embedding.parts import Parts
    from pipeline.generation import Generation


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config keys to set, values as YAML")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--generation", metavar="NAME", help="as it is registered")
    which.add_argument("--artefact", type=Path, metavar="FOLDER", help="of a generation, registered or not")
    parser.add_argument(
        "--config", type=Path, help="YAML file of the run: its registry, its name the family, its store"
    )
    parser.add_argument("--family", help="of the generation; without --config at the default home (BCT_HOME)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="FOLDER|URL", help="a packed data set")
    what.add_argument("--list", type=Path, metavar="FILE", help="a .csv or .parquet with a row for each image")
    what.add_argument("--images", type=Path, metavar="FOLDER", help="a folder of images for each identity")
    parser.add_argument("--where", metavar="ATTRIBUTE=VALUE", help="of --data: only samples whose .json say so")
    parser.add_argument("--image-column", default="path", help="of the list: the images' paths, or the images [path]")
    parser.add_argument("--identity-column", default="identity", help="of the list [identity]")
    parser.add_argument("--skip-missing", action="store_true", help="of the list: files that are missing are no error")
    parser.add_argument("--rows", type=int, default=8192, help="of a .csv in a part [8192]; .parquet: a row group")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the vectors")
    parser.add_argument("--dtype", default="float32", help="of the values: float16 or float32 [float32]")
    parser.add_argument("--batch", default=256, help="images that go through the model at a time [256]")
    parser.add_argument("--limit", default=100, help="images that may turn out not to decode [100]")
    parser.add_argument("--actors", help="processes with the model; 0: this one, no Ray [all that fit]")
    parser.add_argument("--cpus", default=1, help="that each reserves where there is no GPU; also its threads [1]")
    gpu = argparse.BooleanOptionalAction
    parser.add_argument("--gpu", action=gpu, help="one GPU a process [if the cluster has any]")
    options = parser.parse_args(arguments)
    if options.generation is not None and options.config is None and options.family is None:
        parser.error("--generation needs the registry: give --config FILE, or --family NAME")
    if options.overrides and options.config is None:
        parser.error("overrides are of a --config; leave them out without it")
    if options.where is not None and (options.data is None or "=" not in options.where):
        parser.error("--where ATTRIBUTE=VALUE goes with --data, such as --where role=gallery")
    return options


def settings(options: argparse.Namespace) -> EmbedConfig:
    """How images are embedded.

    Raises:
        ConfigError: an option is out of its range.
    """
    import pydantic

    from pipeline.embed import EmbedConfig
    from pipeline.mistakes import option_mistake

    try:
        return EmbedConfig.model_validate({name: getattr(options, name) for name in EmbedConfig.model_fields})
    except pydantic.ValidationError as error:
        raise option_mistake(error) from None


def find_generation(options: argparse.Namespace, config: RunConfig | None) -> Generation:
    """The generation that the options name.

    Raises:
        RegistryError: it is not registered.
        GenerationError: its artefact is missing or has changed.
    """
    from pipeline.generation import Generation

    if options.artefact is not None:
        return Generation(options.artefact)
    from pipeline.errors import RegistryError
    from pipeline.registry_opening import open_registry

    registry = open_registry(config, options.family)
    found = registry.find(options.generation)
    if found is None:
        raise RegistryError(f"generation {options.generation!r} {registry.why_missing(options.generation)}")
    return found.open()


def find_parts(options: argparse.Namespace, config: RunConfig | None) -> Parts:
    """What is embedded.

    Raises:
        ConfigError: --rows is out of its range.
        DataError: it is not there.
    """
    from pipeline.data.sources import FolderSource, FolderSourceConfig, ListSource, ListSourceConfig
    from pipeline.data.store import is_remote
    from pipeline.data.store_remote import StoreConfig
    from pipeline.embedding.parts import ShardParts, SourceParts
    from pipeline.errors import ConfigError

    if options.data is not None:
        location = options.data if is_remote(options.data) else str(Path(options.data).expanduser().absolute())
        attribute, _, value = (options.where or "").partition("=")
        where = (attribute, value) if options.where else None
        return ShardParts(location, config.data.store if config else StoreConfig(), where)
    if options.images is not None:
        return SourceParts(FolderSource(FolderSourceConfig(path=options.images)))
    if options.rows < 1:
        raise ConfigError(f"--rows {options.rows}: a part holds at least one row")
    columns: dict[str, Any] = {"image_column": options.image_column, "identity_column": options.identity_column}
    given = ListSourceConfig(path=options.list, rows=options.rows, skip_missing=options.skip_missing, **columns)
    return SourceParts(ListSource(given))


def run(options: argparse.Namespace) -> None:
    """Embed, and say how many vectors there are."""
    from pipeline.config import load_config

    config = load_config(options.config, options.overrides) if options.config else None
    how = settings(options)
    from pipeline.console import say
    from pipeline.embed import embed

    told = embed(find_generation(options, config), find_parts(options, config), options.out, how)
    say(
        f"vectors      {told['rows']:,} of {told['samples']:,} images in {options.out}, "
        f"{told['rejected']:,} images have none"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code."""
    options = parse(arguments)
    from pipeline.job import exit_code

    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
