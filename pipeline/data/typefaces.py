"""The quickstart's data: real typefaces, rendered. The identity is a character, an image is it in one typeface.

These are not photographs. They are real, free, many-class and can be fetched anywhere that has a package
registry, which no face data set can.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.data.glyphs import degrade, draw_typeface, encode_png, identity_key, jis_kanji
from pipeline.data.sources import Sample
from pipeline.data.typeface_packages import FULL_FAMILIES, PACKAGES, SMALL_FAMILIES, fetch, read_slices
from pipeline.errors import ConfigError
from pipeline.identities import IdentityTable
from pipeline.schema import Config, digest_json

Split = Literal["train", "validation", "test"]

RENDERING = 1  # raise it when an image of the same config changes: fingerprints then differ
FAMILIES = {"small": SMALL_FAMILIES, "full": FULL_FAMILIES}
HELD_OUT_SMALL = (
    "yusei-magic",
    "dela-gothic-one",
    "dotgothic16",
    "zen-kurenaido",
    "ma-shan-zheng",
    "zcool-xiaowei",
)
HELD_OUT = {
    "small": HELD_OUT_SMALL,
    "full": (*HELD_OUT_SMALL, "kiwi-maru", "shippori-mincho", "m-plus-rounded-1c", "lxgw-wenkai"),
}


class TypefaceConfig(Config):
    """Which typefaces and characters there are, and what is kept for the test."""

    profile: Literal["small", "full"] = Field(
        default="small", description="small: 16 families, 135 MB of packages; full: 27 families, 700 MB."
    )
    families: tuple[str, ...] | None = Field(
        default=None, description="Only these families of the profile (tiny tests); all of them when not given."
    )
    held_out_families: tuple[str, ...] | None = Field(
        default=None, description="Families of the test split; the profile's own choice when not given."
    )
    held_out_identities: int = Field(
        default=1000, ge=1, le=6354, description="How many of the 6,355 characters are kept for the test split."
    )
    validation_families: tuple[str, ...] = Field(
        default=(), description="Families of the validation split, taken from the training ones; none: no such split."
    )
    validation_identities: int = Field(
        default=500,
        ge=1,
        le=6354,
        description="How many further characters the validation split takes, if there is one.",
    )
    max_identities: int | None = Field(
        default=None, ge=1, le=6355, description="At most so many identities in a split (tiny tests)."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the choice of held-out identities and of the degradation.")
    size: int = Field(default=40, ge=16, le=512, description="Side of the rendered images in pixels.")
    enrol_family: str = Field(
        default="zen-kurenaido",
        description="Family whose test images form the gallery; all others are queries. "
        "The validation split enrols its first family.",
    )

    @model_validator(mode="after")
    def _families_are_known(self) -> Self:
        known = FAMILIES[self.profile]
        for field in ("families", "held_out_families", "validation_families"):
            for family in getattr(self, field) or ():
                if family not in known:
                    raise ConfigError(
                        f"typefaces.{field}: {family!r} is no family of profile {self.profile!r}; "
                        f"choose among {', '.join(known)}"
                    )
        if both := set(self.validation_families) & set(self._test_families):
            raise ConfigError(
                f"typefaces.validation_families: {min(both)!r} is held out for the test; what is tuned on it would be "
                "tuned on the test's typefaces"
            )
        return self

    @property
    def _test_families(self) -> tuple[str, ...]:
        return self.held_out_families if self.held_out_families is not None else HELD_OUT[self.profile]

    def families_of(self, split: Split) -> tuple[str, ...]:
        """Families of a split, in the profile's order."""
        held_out = {"test": self._test_families, "validation": self.validation_families}
        elsewhere = {family: name for name, families in held_out.items() for family in families}
        chosen = [f for f in FAMILIES[self.profile] if self.families is None or f in self.families]
        return tuple(family for family in chosen if elsewhere.get(family, "train") == split)

    def identities_of(self, split: Split) -> IdentityTable:
        """Identities that a split may hold; no two splits share one, whatever the families are.

        The choice hashes (seed, key): it depends on nothing but the seed and the number.
        """
        table = IdentityTable.from_keys(map(identity_key, jis_kanji()))
        held_out = {"test": table.subset(self.held_out_identities, self.seed)}
        left = _without(table, held_out["test"])
        if self.validation_families:
            held_out["validation"] = left.subset(self.validation_identities, self.seed)
            left = _without(left, held_out["validation"])
        mine = held_out.get(split, left)
        return mine if self.max_identities is None else mine.subset(min(self.max_identities, len(mine)), self.seed)


def _without(table: IdentityTable, other: IdentityTable) -> IdentityTable:
    return IdentityTable(tuple(key for key in table.keys if key not in other.row_of_key))


class TypefaceSource:
    """Rendered characters as a `Source`; one part is one typeface.

    The train split is train families x train identities, clean. The other splits are held-out families x
    held-out identities, each image degraded in its own fixed way; the attribute `role` is `gallery` in the
    enrolment family and `query` in the others. Identities with fewer than `min_images` images in the split are
    not part of it (packing drops them: no single part can know).

    Args:
        config: what to render.
        cache_dir: where the font packages are kept.
        split: `train`, `validation` or `test`.

    Raises:
        ConfigError: the split has no family, or lacks the enrolment family.
    """

    min_images = 2

    def __init__(self, config: TypefaceConfig, cache_dir: Path, split: Split) -> None:
        self.config = config
        self.cache_dir = cache_dir.expanduser().resolve()
        self.split: Split = split
        families = config.families_of(split)
        if not families:
            raise ConfigError(f"typefaces: the {split} split has no family; widen `families` or `held_out_families`")
        self.enrol_family = families[0] if split == "validation" else config.enrol_family
        if split != "train" and self.enrol_family not in families:
            raise ConfigError(
                f"typefaces.enrol_family: {config.enrol_family!r} is not among the held-out families "
                f"({', '.join(families)}); the gallery would be empty"
            )

    @property
    def name(self) -> str:
        """Name of the data set, such as `typefaces-small-train`."""
        return f"typefaces-{self.config.profile}-{self.split}"

    def fingerprint(self) -> str:
        """Sha256 over the config, the split, the pinned packages and the version of the rendering."""
        families = self.config.families_of(self.split)
        packages = {family: [PACKAGES[family].sha512, PACKAGES[family].weight] for family in families}
        return digest_json(
            {
                "source": "typefaces",
                "rendering": RENDERING,
                "config": self.config.model_dump(mode="json"),
                "split": self.split,
                "packages": packages,
            }
        )

    def parts(self) -> list[str]:
        """Families of the split."""
        return list(self.config.families_of(self.split))

    def read(self, part: str) -> Iterator[Sample]:
        """Yield the images of one family, in the order of the standard.

        Raises:
            DataError: the font package cannot be fetched, or is not the pinned one.
        """
        wanted = self.config.identities_of(self.split).row_of_key
        slices = read_slices(part, fetch(part, self.cache_dir))
        # All characters are drawn, whatever is wanted: what counts as a repeated bitmap must not depend on it.
        for character, clean in draw_typeface(slices, self.config.size).items():
            identity = identity_key(character)
            if identity not in wanted:
                continue
            key = f"u{ord(character):04x}-{part}"
            if self.split == "train":
                yield Sample(key, encode_png(clean), "png", identity, {"typeface": part})
            else:
                image = encode_png(degrade(clean, self.config.seed, key))
                role = "gallery" if part == self.enrol_family else "query"
                yield Sample(key, image, "png", identity, {"typeface": part, "role": role})
