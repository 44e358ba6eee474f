"""Which figures an evaluation reports, and their names."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Self

from pydantic import Field, model_validator

from pipeline.schema import Config

Rate = Annotated[float, Field(gt=0, lt=1)]
MAP = "map"


def rate_name(kind: str, rate: float) -> str:
    """A rate as reports write it: 0.001 -> "1e-3", 0.00025 -> "2.5e-4", after `kind` and an @."""
    return f"{kind}@{Decimal(repr(float(rate))).normalize():e}"


def tar_name(far: float) -> str:
    """Name of the true accept rate at a false accept rate: "tar@1e-3"."""
    return rate_name("tar", far)


def tpir_name(fpir: float) -> str:
    """Name of the true positive identification rate at a false positive identification rate: "tpir@1e-2"."""
    return rate_name("tpir", fpir)


class EvaluationConfig(Config):
    """What is measured for each pair of generations, and on which figures compatibility is judged."""

    far: tuple[Rate, ...] = Field(
        (1e-3,), description="False accept rates at which the true accept rate is reported, as 'tar@1e-3'."
    )
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1,), description="Ranks k at which closed-set identification is reported, as 'rank1'."
    )
    fpir: tuple[Rate, ...] = Field(
        (),
        description="False positive identification rates at which open-set identification is reported, as 'tpir@1e-2'.",
    )
    mean_average_precision: bool = Field(False, description="Report the mean average precision, as 'map'.")
    criterion_on: tuple[str, ...] = Field(
        (),
        description="Names of the metrics on which the compatibility criterion must hold; empty: every one reported.",
    )
    bootstrap: int = Field(
        1000, ge=0, le=100_000, description="Resamplings of the identities behind each interval; 0: no intervals."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of the resampling, the open set's galleries and random backfill.")
    group: str = Field("group", description="The samples' attribute within whose equal values pairs are not compared.")

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = self.metric_names
        if not names:
            raise ValueError("far, ranks, fpir and mean_average_precision name nothing: ask for at least one metric")
        if len(set(names)) != len(names):
            raise ValueError(f"a metric is asked for twice in {', '.join(names)}: name each far, rank and fpir once")
        unknown = [name for name in self.criterion_on if name not in names]
        if unknown:
            raise ValueError(f"criterion_on names {unknown[0]!r}, which is not evaluated; choose of {', '.join(names)}")
        return self

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the reported metrics, in the order of reports."""
        return (
            *(f"rank{k}" for k in self.ranks),
            *((MAP,) if self.mean_average_precision else ()),
            *(tpir_name(fpir) for fpir in self.fpir),
            *(tar_name(far) for far in self.far),
        )

    @property
    def judged(self) -> tuple[str, ...]:
        """Names of the metrics that the criterion is judged on."""
        return self.criterion_on or self.metric_names
