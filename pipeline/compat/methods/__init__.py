"""The methods by name: `compat.method` of a generation's config."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pipeline.compat.base import Method
from pipeline.compat.methods.baselines import L2, Finetune, Independent, Lwf
from pipeline.compat.methods.bct import Bct, BctKd, BctSys

METHODS: dict[str, type[Method]] = {
    one.model_fields["method"].default: one for one in (Bct, BctKd, BctSys, Independent, L2, Lwf, Finetune)
}


def _named(value: Any) -> Any:
    """`bct` where no method is named."""
    return {"method": "bct", **value} if isinstance(value, dict) else value


CompatConfig = Annotated[
    Bct | BctKd | BctSys | Independent | L2 | Lwf | Finetune, Field(discriminator="method"), BeforeValidator(_named)
]
