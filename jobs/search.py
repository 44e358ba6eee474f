"""Search a gallery of vectors of one or several generations, which are compared only where a verdict allows it.

python jobs/search.py build --vectors FOLDER --gallery FOLDER                       index vectors of jobs/embed.py
python jobs/search.py build --vectors OLD --vectors NEW --gallery FOLDER --kind hnsw
python jobs/search.py query --gallery FOLDER --queries FILE -k 10                   the nearest items, as JSON
python jobs/search.py query --gallery FOLDER --queries FILE --out HITS.parquet      a row a hit

Verdicts come from the registry of the queries' family (at the default home, or where --config says), or from a file:
--verdicts FILE, a JSON list of {newer, older, held, told} with the generations' digests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.gallery.index import IndexConfig


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    build = jobs.add_parser("build", help="index vectors", argument_default=argparse.SUPPRESS)
    build.add_argument("--vectors", type=Path, action="append", required=True, metavar="PLACE", help="file or folder")
    build.add_argument("--gallery", type=Path, required=True, metavar="FOLDER", help="to write; it has no gallery yet")
    build.add_argument("--kind", help="flat (looks at every vector), ivf or hnsw [flat]")
    build.add_argument("--lists", help="ivf: lists that the vectors are sorted into [4 sqrt(N)]")
    build.add_argument("--probes", help="ivf: lists that a query looks into [16]")
    build.add_argument("--links", help="hnsw: neighbours that a vector is linked to [32]")
    build.add_argument("--build-ef", help="hnsw: candidates kept while the graph is built [80]")
    build.add_argument("--ef", help="hnsw: candidates kept while it is searched [64]")
    query = jobs.add_parser("query", help="find the nearest items")
    query.add_argument("--gallery", type=Path, required=True, metavar="FOLDER", help="to search")
    query.add_argument("--queries", type=Path, required=True, metavar="PLACE", help="vectors of one generation")
    query.add_argument("-k", type=int, default=10, help="items for each query [10]")
    query.add_argument("--out", type=Path, metavar="FILE", help="to write, .json or .parquet [print JSON]")
    query.add_argument("--verdicts", type=Path, metavar="FILE", help="JSON list of verdicts, not the registry's")
    query.add_argument("--config", type=Path, help="YAML file of a run: where the registry is")
    options = parser.parse_args(arguments)
    if options.job == "query" and options.k < 1:
        parser.error(f"-k {options.k}: at least 1")
    if options.job == "query" and options.out and options.out.suffix not in (".json", ".parquet"):
        parser.error(f"--out {options.out}: a name that ends in .json or .parquet")
    return options


def index_config(options: argparse.Namespace) -> IndexConfig:
    """How the gallery is indexed.

    Raises:
        ConfigError: an option is out of its range.
    """
    import pydantic

    from pipeline.gallery.index import IndexConfig
    from pipeline.mistakes import option_mistake

    try:
        return IndexConfig(**{name: value for name, value in vars(options).items() if name in IndexConfig.model_fields})
    except pydantic.ValidationError as error:
        raise option_mistake(error) from None


def build_gallery(options: argparse.Namespace) -> None:
    """Index vectors and write the gallery."""
    from pipeline.console import say
    from pipeline.search import Gallery
    from pipeline.vectors import read_vectors, vector_files

    config = index_config(options)
    gallery = Gallery.of([read_vectors(vector_files(place)) for place in options.vectors], config)
    gallery.save(options.gallery)
    say(f"{options.gallery}: {gallery}; {config.kind}")


def query_gallery(options: argparse.Namespace) -> None:
    """Search, and print or write what was found."""
    from pipeline.console import say
    from pipeline.gallery.hits import print_hits, write_hits
    from pipeline.recorded_verdicts import recorded_verdicts
    from pipeline.search import Gallery
    from pipeline.vectors import read_vectors, vector_files

    gallery = Gallery.load(options.gallery)
    queries = read_vectors(vector_files(options.queries))
    verdicts = recorded_verdicts(options.verdicts, options.config, queries.stamp.family)
    hits = gallery.search(queries, options.k, verdicts)
    if options.out is None:
        print_hits(queries.keys, hits)
    else:
        write_hits(options.out, queries.keys, hits)
        say(f"{options.out}: what {len(queries.keys):,} queries of {queries.stamp.generation} found in {gallery}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code."""
    options = parse(arguments)
    from pipeline.job import exit_code

    return exit_code(lambda: {"build": build_gallery, "query": query_gallery}[options.job](options))


if __name__ == "__main__":
    sys.exit(main())
