"""Which generations are compared: their order, who descends from whom, and whose paragon is whose."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lineage:
    """A family.

    Attributes:
        order: the generations, oldest first.
        parents: of each generation; those that are not in `order` are ignored.
        paragons: the generation trained without regard to the old ones, by the name of the one it stands beside.
    """

    order: tuple[str, ...]
    parents: Mapping[str, Sequence[str]]
    paragons: Mapping[str, str]

    def ancestors(self, name: str) -> set[str]:
        """Parents, their parents, and so on."""
        found: set[str] = set()
        waiting = list(self.parents.get(name, ()))
        while waiting:
            parent = waiting.pop()
            if parent not in found:
                found.add(parent)
                waiting += self.parents.get(parent, ())
        return found & set(self.order)

    def pairs(self, dimensions: Mapping[str, int], mapped: Collection[tuple[str, str]] = ()) -> list[tuple[str, str]]:
        """Every self-test, and every (query, gallery) of a later and an earlier generation that can be compared.

        Args:
            dimensions: of the embeddings; queries need at least as many as their gallery,
            mapped: but for these (query, gallery), between which there is a learned map.
        """
        return [
            (query, gallery)
            for place, query in enumerate(self.order)
            for gallery in self.order[: place + 1]
            if dimensions[query] >= dimensions[gallery] or (query, gallery) in mapped
        ]

    def upgrades(self) -> Iterator[tuple[str, str]]:
        """Every (generation, ancestor), in the order of the generations."""
        for name in self.order:
            yield from ((name, older) for older in self.order if older in self.ancestors(name))

    def served(self) -> list[str]:
        """The generations that are no paragons, oldest first."""
        return [name for name in self.order if name not in self.paragons.values()]
