"""Floor 0. What a config class is: a frozen, keyword-only dataclass that states its own ranges.

The ranges are annotations (`Count`, `Fraction`, ...): they go into the JSON Schema and are checked
where a recipe is read (recipe.py). Nothing here imports the validator, so hot modules stay lean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, TypeVar, dataclass_transform

from annotated_types import Ge, Gt, Interval

T = TypeVar("T")

Count = Annotated[int, Interval(gt=0, lt=1 << 31)]  # 1, 2, 3, ...
Index = Annotated[int, Ge(0)]  # 0, 1, 2, ...
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]  # both ends allowed
Factor = Annotated[float, Interval(gt=0, le=1)]
Angle = Annotated[float, Interval(ge=0, lt=math.pi)]  # radians, not degrees
Share = Annotated[float, Interval(ge=0, lt=1)]  # 1 itself makes no sense (a dropout rate, ...)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen keyword-only dataclass that refuses unknown keys when read from a file."""
    frozen = dataclass(frozen=True, kw_only=True)(cls)
    frozen.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return frozen
