"""The stamp: what vectors say of themselves, and what must be on record before they are compared with others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import pydantic
from pydantic import Field

from pipeline.errors import DataError, GenerationError
from pipeline.generation import Generation
from pipeline.schema import Config, digest_json

STAMP = "bct.stamp"  # the key under which a file's metadata hold it


class Stamp(Config):
    """Which model made a vector, and how; it travels with every vector file, index and exported model."""

    family: str = Field(description="of the generation; vectors of two families are never compared")
    generation: str = Field(description="name of the model")
    digest: str = Field(description="of the generation's artefact: another artefact of the same name is another model")
    dim: int = Field(gt=0, description="values of a vector")
    normalised: bool = Field(True, description="whether the vectors have length 1")
    preprocess: str = Field(description="digest of the preprocessing of the images")

    @classmethod
    def of(cls, generation: Generation, normalised: bool = True) -> Self:
        """Of a generation's vectors.

        Raises:
            GenerationError: it has no backbone, so it makes no vectors.
        """
        record = generation.record
        if record.preprocess is None:
            raise GenerationError(f"generation {record.name!r} at {generation.path} has no backbone to embed with")
        return cls(
            family=record.family,
            generation=record.name,
            digest=generation.digest,
            dim=record.embedding_dim,
            normalised=normalised,
            preprocess=digest_json(record.preprocess.model_dump(mode="json")),
        )

    @classmethod
    def parse(cls, text: str | bytes | None, where: str) -> Self:
        """Read one from a file's metadata.

        Args:
            text: JSON; None: the file has none.
            where: the file, for errors.

        Raises:
            DataError: there is none, or it is no stamp.
        """
        if text is None:
            raise DataError(
                f"{where} has no stamp of the generation that made its vectors: embed again (jobs/embed.py)"
            )
        try:
            return cls.model_validate_json(text)
        except pydantic.ValidationError as error:
            raise DataError(f"{where} has a stamp that cannot be read: {error.errors()[0]['msg']}") from None


@dataclass(frozen=True)
class Verdict:
    """What an evaluation found: may the newer generation's queries search the older one's gallery?

    Attributes:
        newer: digest of the query's generation.
        older: digest of the gallery's.
        held: the criterion held on every metric judged.
        told: the differences with their intervals, for people.
    """

    newer: str
    older: str
    held: bool
    told: str = ""


class Verdicts:
    """The verdicts of a family, by the two generations' digests."""

    def __init__(self, verdicts: Iterable[Verdict] = ()) -> None:
        self._by_pair: Mapping[tuple[str, str], Verdict] = {(one.newer, one.older): one for one in verdicts}

    def require(self, query: Stamp, gallery: Stamp) -> None:
        """Refuse to compare vectors whose generations are not recorded as compatible.

        Raises:
            DataError: they are of two families, of one model through two preprocessings, or the verdict that would
                allow it is missing, or says no; the message names it.
        """
        pair = f"queries of {query.generation!r} on a gallery of {gallery.generation!r}"
        if query.family != gallery.family:
            raise DataError(f"{pair}: families {query.family!r} and {gallery.family!r} share no space; embed one again")
        if query.digest == gallery.digest:
            if query.preprocess != gallery.preprocess:
                raise DataError(f"{pair}: their images went through two preprocessings; embed one again")
            return
        verdict = self._by_pair.get((query.digest, gallery.digest))
        if verdict is None:
            raise DataError(
                f"{pair}: no verdict is recorded that {query.generation!r} ({query.digest[:12]}) is compatible with "
                f"{gallery.generation!r} ({gallery.digest[:12]}); evaluate them (jobs/evaluate.py) if it "
                "was trained against it, or embed again"
            )
        if not verdict.held:
            raise DataError(
                f"{pair}: the recorded verdict says that they are incompatible ({verdict.told}); embed again"
            )
