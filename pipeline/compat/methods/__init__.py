"""The methods by name: `compat.method` of a generation's config."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from pipeline.compat.base import Method
from pipeline.compat.methods.adapters import AffineAdapter, OrthogonalAdapter
from pipeline.compat.methods.advbct import AdvBct
from pipeline.compat.methods.baselines import L2, Finetune, Independent, Lwf
from pipeline.compat.methods.bct import Bct, BctKd, BctSys
from pipeline.compat.methods.bt2 import Bt2
from pipeline.compat.methods.fct import Fct
from pipeline.compat.methods.lce import Lce
from pipeline.compat.methods.live import Live
from pipeline.compat.methods.mixbct import MixBct
from pipeline.compat.methods.ract import Nccl, Ract
from pipeline.compat.methods.unibct import UniBct

# One line a method.
CLASSES: tuple[type[Method], ...] = (
    Bct,
    BctKd,
    BctSys,
    Independent,
    L2,
    Lwf,
    Finetune,
    Ract,
    Nccl,
    Lce,
    AdvBct,
    MixBct,
    UniBct,
    Bt2,
    AffineAdapter,
    OrthogonalAdapter,
    Fct,
    Live,
)
METHODS: dict[str, type[Method]] = {one.model_fields["method"].default: one for one in CLASSES}


def _named(value: Any) -> Any:
    """`bct` where no method is named."""
    return {"method": "bct", **value} if isinstance(value, dict) else value


if TYPE_CHECKING:
    CompatConfig = Method
else:
    CompatConfig = Annotated[reduce(or_, CLASSES), Field(discriminator="method"), BeforeValidator(_named)]
