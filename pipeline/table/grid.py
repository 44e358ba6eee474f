"""The grid: cells that become generations of one run, and the tables that are made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
from pydantic import Field

from pipeline.config import RunConfig, load_tree, merge, read_yaml
from pipeline.errors import ConfigError
from pipeline.schema import Config


class Row(Config):
    """One line of a table: a new model on an old one's gallery."""

    label: str = Field(description="as the table says it")
    new: str = Field(description="cell of the new model")
    old: str = Field("v1", description="cell of the model whose gallery is searched")
    paragon: str | None = Field("paragon", description="cell of the new model without a parent; none: no gain")
    paper: str = Field("", description="what the paper has for it, in its own figures")


class Table(Config):
    """One table of the results."""

    title: str
    text: str = Field("", description="what stands above it")
    split: str = Field("test", pattern="^(test|validation)$", description="of the held-out images")
    templates: int = Field(
        0,
        ge=0,
        description="0: single images, 1:1 and 1:N; else 1:N alone, on templates of so many groups' images",
    )
    rows: tuple[Row, ...] = Field(min_length=1)


class Grid(Config):
    """What `configs/paper_table.yaml` holds, with its cells expanded.

    Attributes:
        run: the run whose generations are the cells, one for each seed.
        seeds: how many of each cell.
        tables: what is made of them.
        text: what stands above the tables.
    """

    run: RunConfig
    seeds: dict[str, int]
    tables: tuple[Table, ...] = Field(min_length=1)
    text: str = ""

    @pydantic.model_validator(mode="after")
    def _rows_name_cells(self) -> Grid:
        for table in self.tables:
            for row in table.rows:
                for cell in (row.new, row.old, row.paragon):
                    if cell is not None and cell not in self.seeds:
                        raise ValueError(f"table {table.title!r}, row {row.label!r}: there is no cell {cell!r}")
        return self

    def heading(self, command: str) -> str:
        """The top of the results."""
        return (
            f"# Results\n\n{self.text.strip()}\n\nMade by `{command}`; every figure and interval as JSON beside it.\n"
        )

    def generations(self, cell: str) -> list[str]:
        """Names of a cell's generations, by seed."""
        return [generation_name(cell, seed, self.seeds[cell]) for seed in range(self.seeds[cell])]


def generation_name(cell: str, seed: int, seeds: int) -> str:
    """Of a cell at a seed; a cell of fewer seeds stands in with what it has."""
    return cell if seeds == 1 else f"{cell}-s{min(seed, seeds - 1)}"


def load_grid(path: Path, overrides: list[str]) -> Grid:
    """Read a grid; overrides are `cells.NAME.key=value`, `run.key=value` or `defaults.key=value`.

    Raises:
        ConfigError: the file is missing or no grid.
    """
    tree = read_yaml(path, overrides)
    cells, defaults = tree.get("cells"), tree.get("defaults") or {}
    if not isinstance(cells, dict) or not isinstance(tree.get("run"), dict):
        raise ConfigError(f"{path} is no grid: it needs `run`, a run's config, and `cells`, its generations")
    seeds = {cell: int((own or {}).get("seeds", 1)) for cell, own in cells.items()}
    generations: dict[str, Any] = {}
    for cell, own in cells.items():
        merged = merge(defaults, {key: value for key, value in (own or {}).items() if key != "seeds"})
        for seed in range(seeds[cell]):
            parents = [generation_name(parent, seed, seeds.get(parent, 1)) for parent in merged.get("parents", [])]
            generations[generation_name(cell, seed, seeds[cell])] = {**merged, "parents": parents, "seed": seed}
    run = load_tree({**tree["run"], "generations": generations}, path)
    try:
        return Grid.model_validate(
            {"run": run, "seeds": seeds, "tables": tree.get("tables") or (), "text": tree.get("text", "")}
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
