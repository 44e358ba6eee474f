"""Which generation serves: the alias `serving` of the family's registered model, and what it served before.

    alias `serving`                   the version that serves; moving it is one write, which the store makes whole
    tag `promotions` of the model     JSON list of what was promoted and rolled back, newest last
    tag `galleries` of a version      JSON: name and digest of the generations whose vectors its galleries hold

The history is written before the alias moves. What served before a version is what its own last promotion replaced: an
entry whose alias never moved, since the process was killed between the two, is nobody's past.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal, Self

import pydantic
from pydantic import Field, TypeAdapter

from pipeline.errors import RegistryError
from pipeline.registry import CANDIDATE, Registry
from pipeline.schema import Config
from pipeline.tracking.versions import RegisteredGeneration

SERVING, HISTORY, GALLERIES = "serving", "promotions", "galleries"
MAX_HISTORY = 5000  # characters of a registered model's tag, which PostgreSQL holds to; older entries are let go

Kind = Literal["promote", "rollback"]


class Served(Config):
    """A version that serves or served."""

    generation: str
    version: str
    digest: str = Field(description="of the generation, the first 12 digits")

    @classmethod
    def of(cls, one: RegisteredGeneration) -> Self:
        """Of a registered generation."""
        return cls(generation=one.name, version=one.version, digest=one.digest[:12])


class Move(Config):
    """One move of the alias `serving`."""

    at: str = Field(description="UTC, ISO 8601")
    kind: Kind
    to: Served
    instead_of: Served | None


_MOVES: TypeAdapter[list[Move]] = TypeAdapter(list[Move])


class Serving:
    """The alias `serving` of a family, and its history; whoever moves it holds the family's lock."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._client, self._family = registry, registry.client, registry.family

    def now(self) -> RegisteredGeneration | None:
        """The generation that serves; None: none does.

        Raises:
            RegistryError: the alias was given by hand to a version that is no generation.
        """
        return self._by_alias(SERVING)

    def candidate(self) -> RegisteredGeneration | None:
        """The generation that an evaluation chose to be the next."""
        return self._by_alias(CANDIDATE)

    def history(self) -> list[Move]:
        """The moves that are remembered, oldest first.

        Raises:
            RegistryError: the tag was changed by hand, and cannot be read.
        """
        with self._registry.errors("reading the history of promotions"):
            text = self._client.get_registered_model(self._family).tags.get(HISTORY, "[]")
        try:
            return _MOVES.validate_json(text)
        except pydantic.ValidationError:
            raise RegistryError(
                f"the tag {HISTORY!r} of {self._registry.where} cannot be read, it was changed by hand: mend it in "
                "MLflow, or delete it (there is nothing to roll back to then)"
            ) from None

    def before(self, now: RegisteredGeneration) -> Served | None:
        """What served before the version that serves; None: nothing that is remembered."""
        moves = self.history()
        own = [move.instead_of for move in moves if move.kind == "promote" and move.to.version == now.version]
        if own:
            return own[-1]
        return moves[-1].to if moves else None  # the alias was moved by hand: what served last that we know of

    def last(self) -> Served | None:
        """What served last as far as is remembered, whether it does still or not."""
        moves = self.history()
        return moves[-1].to if moves else None

    def galleries(self, one: RegisteredGeneration) -> dict[str, str]:
        """Digests of the generations whose vectors a version's galleries hold, by name; its own are not told.

        Raises:
            RegistryError: the tag was changed by hand, and cannot be read.
        """
        try:
            return {str(name): str(digest) for name, digest in json.loads(one.tags.get(GALLERIES, "{}")).items()}
        except (ValueError, AttributeError):
            raise RegistryError(
                f"the tag {GALLERIES!r} of version {one.version} ({one.name!r}) cannot be read: delete it in MLflow, "
                "and name the galleries by --gallery or --live"
            ) from None

    def set_galleries(self, one: RegisteredGeneration, galleries: Mapping[str, str]) -> None:
        """Record whose vectors a version's galleries hold, such as after a backfill."""
        with self._registry.errors(f"recording the galleries of {one.name!r}"):
            self._client.set_model_version_tag(self._family, one.version, GALLERIES, json.dumps(dict(galleries)))

    def move(
        self, to: RegisteredGeneration, now: RegisteredGeneration | None, galleries: Mapping[str, str], kind: Kind
    ) -> None:
        """Let a generation serve, instead of the one that serves now.

        Raises:
            RegistryError: the store refuses.
        """
        self.set_galleries(to, galleries)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        move = Move(at=at, kind=kind, to=Served.of(to), instead_of=None if now is None else Served.of(now))
        text = _json([*self.history(), move])
        with self._registry.errors(f"moving the alias {SERVING!r} to {to.name!r}"):
            self._client.set_registered_model_tag(self._family, HISTORY, text)
            self._client.set_registered_model_alias(self._family, SERVING, to.version)
        if kind == "promote":
            self.drop_candidate(to)

    def drop_candidate(self, one: RegisteredGeneration) -> None:
        """Take the alias `candidate` from a version that serves."""
        candidate = self.candidate()
        if candidate is not None and candidate.version == one.version:
            with self._registry.errors(f"removing the alias {CANDIDATE!r}"):
                self._client.delete_registered_model_alias(self._family, CANDIDATE)

    def _by_alias(self, alias: str) -> RegisteredGeneration | None:
        with self._registry.errors(f"reading the alias {alias!r}"):
            version = self._client.get_registered_model(self._family).aliases.get(alias)
        if version is None:
            return None
        found = [one for one in self._registry.versions().values() if one.version == str(version)]
        if not found:
            raise RegistryError(
                f"the alias {alias!r} of {self._registry.where} is on version {version}, which is no generation: "
                "it was moved by hand; move it back in MLflow, or delete it"
            )
        return found[0]


def _json(moves: Sequence[Move]) -> str:
    """The newest moves that a tag has room for."""
    for first in range(len(moves)):
        text = json.dumps([move.model_dump() for move in moves[first:]])
        if len(text) <= MAX_HISTORY:
            return text
    raise AssertionError("one move fits")
