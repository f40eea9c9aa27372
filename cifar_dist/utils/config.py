"""The `config` decorator for frozen dataclasses, and annotated number types.

The ranges of `Count`, `Fraction` etc. go into the JSON Schema and are checked by recipe/load.py.
This module does not import pydantic, so that modules which define a config stay light.
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
Fraction = Annotated[float, Interval(ge=0, le=1)]  # [0, 1]
Factor = Annotated[float, Interval(gt=0, le=1)]  # (0, 1]
Share = Annotated[float, Interval(ge=0, lt=1)]  # [0, 1), such as a dropout rate
Angle = Annotated[float, Interval(ge=0, lt=math.pi)]  # in radians; the limit catches degrees


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen keyword-only dataclass that refuses unknown keys when read from a file."""
    frozen = dataclass(frozen=True, kw_only=True)(cls)
    frozen.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return frozen
