"""A gallery in PostgreSQL with pgvector, moved from one generation to the next while it is searched.

python docs/examples/pgvector.py load PLACE             vectors of jobs/embed.py; they replace those of the same keys
python docs/examples/pgvector.py search PLACE -k 3      what each query finds, counted

PLACE is a folder of vectors, or a file of it.

The database is that of DATABASE_URL; the role must be allowed to create the extension, or find it there.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import psycopg
import pyarrow.parquet as pq

SAMPLE = 1024  # vectors of a generation that tell how its scores spread

# The mean and the spread of the cosines of strangers, between the newest generation's vectors and those of another.
SPREAD = """
SELECT avg(-(a.vector <#> b.vector)), stddev_pop(-(a.vector <#> b.vector))
FROM (SELECT * FROM gallery WHERE generation = %(newest)s ORDER BY md5(key) LIMIT %(sample)s) a,
     (SELECT * FROM gallery WHERE generation = %(other)s ORDER BY md5(key) LIMIT %(sample)s) b
WHERE a.key <> b.key AND (a.identity = '' OR a.identity <> b.identity)
"""
NEAREST = """
SELECT key, -(vector <#> %(query)s::vector) AS cosine FROM gallery
WHERE generation = %(generation)s ORDER BY vector <#> %(query)s::vector LIMIT %(k)s
"""


def files(place: Path) -> list[Path]:
    """A file itself, or those of a folder."""
    return sorted(place.glob("*.parquet")) if place.is_dir() else [place]


def load(database: psycopg.Connection, place: Path) -> str:
    """Put vectors into the table, in one transaction: a search sees all of them or none."""
    with database.transaction():
        database.execute("CREATE EXTENSION IF NOT EXISTS vector")
        for path in files(place):
            table = pq.read_table(path)
            stamp = json.loads(table.schema.metadata[b"bct.stamp"])
            database.execute(
                "CREATE TABLE IF NOT EXISTS gallery (key text PRIMARY KEY, identity text NOT NULL, "
                f"generation text NOT NULL, vector vector({int(stamp['dim'])}) NOT NULL)"
            )
            database.execute("CREATE TEMP TABLE arriving (LIKE gallery) ON COMMIT DROP")
            with database.cursor().copy("COPY arriving FROM STDIN") as copy:
                for row in table.to_pylist():
                    copy.write_row((row["key"], row["identity"], stamp["generation"], str(row["vector"])))
            database.execute(
                "INSERT INTO gallery SELECT * FROM arriving ON CONFLICT (key) DO UPDATE "
                "SET identity = excluded.identity, generation = excluded.generation, vector = excluded.vector"
            )
            database.execute("DROP TABLE arriving")
    counts = database.execute("SELECT generation, count(*) FROM gallery GROUP BY generation ORDER BY generation")
    return _counts(counts.fetchall())


def _counts(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count:,} of {generation}" for generation, count in counts)


def scales(database: psycopg.Connection, newest: str) -> dict[str, tuple[float, float]]:
    """(factor, shift) of each generation's cosines; as they are, moved items would crowd out the others.

    A gallery that has nothing of the queries' generation yet keeps its cosines.
    """
    names = [name for (name,) in database.execute("SELECT DISTINCT generation FROM gallery").fetchall()]
    if newest not in names:
        return dict.fromkeys(names, (1.0, 0.0))
    spreads = {}
    for name in names:
        told = database.execute(SPREAD, {"newest": newest, "other": name, "sample": SAMPLE}).fetchone()
        assert told is not None, "an aggregate has one row"
        spreads[name] = told
    mean, deviation = spreads[newest]
    return {name: (deviation / its, mean - deviation / its * middle) for name, (middle, its) in spreads.items()}


def search(database: psycopg.Connection, place: Path, k: int) -> dict[str, list[tuple[float, str, str]]]:
    """(score, key, generation) of the k nearest of each query, best first."""
    found = {}
    for path in files(place):
        table = pq.read_table(path)
        of_generation = scales(database, json.loads(table.schema.metadata[b"bct.stamp"])["generation"])
        for row in table.to_pylist():
            hits = []
            for generation, (factor, shift) in of_generation.items():
                asked = {"query": str(row["vector"]), "generation": generation, "k": k}
                near = database.execute(NEAREST, asked).fetchall()
                hits += [(factor * cosine + shift, key, generation) for key, cosine in near]
            found[row["key"]] = sorted(hits, key=lambda hit: (-hit[0], hit[1]))[:k]
    return found


def main() -> None:
    """Load or search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load", "search"))
    parser.add_argument("place", type=Path)
    parser.add_argument("-k", type=int, default=3)
    arguments = parser.parse_args()
    with psycopg.connect(os.environ["DATABASE_URL"]) as database:
        if arguments.what == "load":
            print(f"gallery: {load(database, arguments.place)}")
            return
        found = search(database, arguments.place, arguments.k)
        nearest = Counter(hits[0][2] for hits in found.values() if hits)
        print(f"{len(found):,} queries; their nearest items: {_counts(sorted(nearest.items()))}")


if __name__ == "__main__":
    main()
