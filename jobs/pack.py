"""Pack a data set into shards: `python jobs/pack.py --source folder --path IMAGES --out DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pydantic
import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pipeline.cluster import connect
from pipeline.data.manifest import Manifest
from pipeline.data.packing import REJECTS, PackConfig, pack
from pipeline.data.sources import FolderSource, FolderSourceConfig, Source
from pipeline.data.typefaces import TypefaceConfig, TypefaceSource
from pipeline.errors import ConfigError, PipelineError


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="jobs/pack.py", description="Decode images once, and pack those that decode into shards with a manifest."
    )
    parser.add_argument("--source", choices=("folder", "typefaces"), required=True, help="where images come from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the packed data set")
    parser.add_argument("--path", type=Path, help="folder: one folder of images per identity")
    parser.add_argument("--profile", choices=("small", "full"), default="small", help="typefaces: how many of them")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="typefaces: which identities")
    parser.add_argument("--cache", type=Path, help="typefaces: where font packages are kept [OUT/../fonts]")
    parser.add_argument("--min-images", type=int, default=1, help="leave out identities with fewer images [1]")
    parser.add_argument("--shard-size", type=int, default=4096, help="images in a shard [4096]")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle, and of the typefaces' split [0]")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace) -> tuple[Source, PackConfig]:
    """Make the source and the config that the command line asks for.

    Raises:
        ConfigError: an option is missing or out of its range.
        DataError: there is nothing at --path.
    """
    try:
        config = PackConfig(shard_size=options.shard_size, seed=options.seed, min_images=options.min_images)
        if options.source == "typefaces":
            fonts = options.cache or options.out.expanduser().resolve().parent / "fonts"
            typefaces = TypefaceConfig(profile=options.profile, seed=options.seed)
            return TypefaceSource(typefaces, fonts, options.split), config
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option}: {first['msg']}, not {first['input']!r}") from None
    if options.path is None:
        raise ConfigError("--source folder needs --path, the folder with one folder of images per identity")
    return FolderSource(FolderSourceConfig(path=options.path)), config


def run(source: Source, destination: Path, config: PackConfig) -> Manifest:
    """Pack with progress bars on stderr, in a Ray that is there or one of its own."""
    mine = not ray.is_initialized()
    connect()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as bars:
            stages: dict[str, TaskID] = {}

            def report(done: int, total: int, what: str) -> None:
                if what not in stages:
                    stages[what] = bars.add_task(what, total=total)
                bars.update(stages[what], completed=done)

            return pack(source, destination, config, report)
    finally:
        if mine:
            ray.shutdown()


def summarise(manifest: Manifest) -> str:
    """Tell in a few lines what was packed."""
    size = sum(entry.bytes for entry in manifest.shards)
    lines = [
        f"{manifest.name}: {manifest.samples:,} samples of {manifest.identities_count:,} identities "
        f"in {len(manifest.shards)} shards, {size:,} bytes, at {manifest.folder}"
    ]
    lines += [f"  not packed: {count:,} ({reason})" for reason, count in manifest.rejects.items()]
    if manifest.rejects:
        lines.append(f"  which: {manifest.folder / REJECTS}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        source, config = build(options)
        print(summarise(run(source, options.out, config)))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
