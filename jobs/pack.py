"""Pack a data set into shards: `python jobs/pack.py --source folder --path IMAGES --out DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pydantic
import ray
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pipeline.cluster import connect
from pipeline.data.adopting import adopt
from pipeline.data.finishing import REJECTS_FILE
from pipeline.data.manifest import Manifest
from pipeline.data.packing import PackConfig, pack
from pipeline.data.sources import (
    FolderSource,
    FolderSourceConfig,
    ListSource,
    ListSourceConfig,
    RecordSource,
    RecordSourceConfig,
    Source,
    WebDatasetConfig,
    WebDatasetSource,
)
from pipeline.data.sources_eval import (
    BinSource,
    BinSourceConfig,
    IjbSource,
    IjbSourceConfig,
    Market1501Config,
    Market1501TestSource,
    Market1501TrainSource,
    QueryGalleryConfig,
    QueryGallerySource,
)
from pipeline.data.spool import ReadConfig
from pipeline.data.summary import PICTURE, TEXT
from pipeline.data.tasks import Progress as Tell
from pipeline.data.typefaces import TypefaceConfig, TypefaceSource
from pipeline.errors import ConfigError, PipelineError
from pipeline.schema import Config


class TypefaceOptions(Config):
    """What the job offers of the quickstart's data."""

    profile: Literal["small", "full"] = Field(default="small", description="how many typefaces")
    split: Literal["train", "test"] = Field(default="train", description="which identities")
    cache: Path | None = Field(default=None, description="where font packages are kept; OUT/../fonts when not given")
    seed: int = Field(default=0, ge=0, description="of the choice of held-out identities")

    def source(self, out: Path) -> TypefaceSource:
        """The source that is asked for."""
        fonts = self.cache or out.expanduser().resolve().parent / "fonts"
        return TypefaceSource(TypefaceConfig(profile=self.profile, seed=self.seed), fonts, self.split)


class Entry(NamedTuple):
    """A kind of source: the config whose fields are its options, and how to make it of that and of --out."""

    config: type[Config]
    make: Callable[[Any, Path], Source]


SOURCES = {
    "folder": Entry(FolderSourceConfig, lambda config, _: FolderSource(config)),
    "list": Entry(ListSourceConfig, lambda config, _: ListSource(config)),
    "recordio": Entry(RecordSourceConfig, lambda config, _: RecordSource(config)),
    "webdataset": Entry(WebDatasetConfig, lambda config, _: WebDatasetSource(config)),
    "insightface-bin": Entry(BinSourceConfig, lambda config, _: BinSource(config)),
    "ijb": Entry(IjbSourceConfig, lambda config, _: IjbSource(config)),
    "market1501-train": Entry(Market1501Config, lambda config, _: Market1501TrainSource(config)),
    "market1501-test": Entry(Market1501Config, lambda config, _: Market1501TestSource(config)),
    "query-gallery": Entry(QueryGalleryConfig, lambda config, _: QueryGallerySource(config)),
    "typefaces": Entry(TypefaceOptions, TypefaceOptions.source),
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line: the options are the fields of the packer's config and of every source's."""
    parser = argparse.ArgumentParser(
        prog="jobs/pack.py", description="Decode images once, and pack those that decode into shards with a manifest."
    )
    parser.add_argument("--source", choices=SOURCES, required=True, help="where images come from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the packed data set")
    parser.add_argument(
        "--adopt", action="store_true", help="webdataset: leave the tars as they are, and write what is missing beside"
    )
    told: dict[str, list[str]] = {}
    switches: set[str] = set()
    configs: list[tuple[str, type[Config]]] = [("", PackConfig), *((kind, one.config) for kind, one in SOURCES.items())]
    for kind, config in configs:
        for name, field in config.model_fields.items():
            default = "" if field.default is None or field.is_required() else f" [{field.default}]"
            told.setdefault(name, []).append(f"{kind and f'{kind}: '}{field.description}{default}")
            switches |= {name} if field.annotation is bool else set()
    for name, words in told.items():
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if name in switches else {}
        parser.add_argument(_option(name), help="; ".join(words).replace("%", "%%"), **how)
    return parser.parse_args(arguments)


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def build(options: argparse.Namespace) -> Callable[[Tell], Manifest]:
    """Make the source and the config that the command line asks for, and return what is to be done with them.

    Raises:
        ConfigError: an option is missing, out of its range, or not one of this source.
        DataError: there is nothing at --path.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    kind, out, adopts = given.pop("source"), given.pop("out"), given.pop("adopt")
    entry, what = SOURCES[kind], f"--source {kind}{' --adopt' if adopts else ''}"
    layout = ReadConfig if adopts else PackConfig
    if strangers := sorted(set(given) - {*entry.config.model_fields, *layout.model_fields}):
        raise ConfigError(f"{_option(strangers[0])} is no option of {what}; leave it out")
    config = _model(layout, given, what)
    source = entry.make(_model(entry.config, given, what), out)
    tars = source.root if isinstance(source, WebDatasetSource) else None
    if not adopts and tars == out.expanduser().resolve():
        raise ConfigError(
            f"--out {out} is the folder of the tars that are packed; give another, or adopt them: --adopt"
        )
    if not adopts:
        return partial(pack, source, out, config)
    if not isinstance(source, WebDatasetSource):
        raise ConfigError(f"--adopt is for WebDataset tars; leave it out with --source {kind}")
    return partial(adopt, source, out, config)


def _model(config: type[Config], given: dict[str, Any], what: str) -> Any:
    """The config of those options that are its fields."""
    try:
        return config.model_validate({name: value for name, value in given.items() if name in config.model_fields})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "missing":
            told = config.model_fields[name].description
            raise ConfigError(f"{what} needs {_option(name)}: {told}") from None
        where = f"{_option(name)}: " if name else ""
        raise ConfigError(f"{where}{first['msg']}, not {first['input']!r}") from None


def run(work: Callable[[Tell], Manifest]) -> Manifest:
    """Do it with progress bars on stderr, in a Ray that is there or one of its own."""
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

            return work(report)
    finally:
        if mine:
            ray.shutdown()


def summarise(manifest: Manifest) -> str:
    """Tell in a few lines what was packed."""
    lines = (manifest.folder / TEXT).read_text().splitlines()
    lines += [f"  which: {manifest.folder / REJECTS_FILE}"] if manifest.rejects else []
    return "\n".join([*lines, f"  see {manifest.folder / PICTURE}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        print(summarise(run(build(options))))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
