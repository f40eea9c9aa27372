"""Floor 1. Automatic augmentation: RandAugment and TrivialAugment over the usual 14 operations.

Of a step's 14 operations each picture gets one. All are parameters of three dense ops: five are a warp
(a matrix), four a blend (another picture and a factor), four a table of levels, and one nothing. The
op's parameters stand in the table, and the ops which a picture does not get leave it alone.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from cifar_dist.data.augment.image_ops import BLEND_OPS, LUT_OPS, SIDE, apply_lut, enhance, warp
from cifar_dist.utils.config import Count, Fraction, config
from cifar_dist.utils.random import KeyedRandom

WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
OPERATIONS = ("identity", *WARPS, *BLEND_OPS[1:], *LUT_OPS[1:])
MAGNITUDES = 30  # the highest magnitude; the lowest is 0

Magnitude = Annotated[int, Interval(ge=0, le=MAGNITUDES)]


@config
class Ranges:
    """What the highest magnitude of each operation means."""

    shear: float  # tangent of the angle
    translate: float  # pixels
    rotate: float  # degrees
    enhance: float  # how far from 1 the factor of a blend is
    posterize: int  # how many of 8 bits go


# Cubuk et al. 2018 (AutoAugment, arXiv 1805.09501), table 6; 150 of 331 pixels, as its code and torchvision have it
AUTO_RANGES = Ranges(shear=0.3, translate=150 / 331 * SIDE, rotate=30.0, enhance=0.9, posterize=4)
# Müller and Hutter 2021 (TrivialAugment, arXiv 2103.10158), the wide space
WIDE_RANGES = Ranges(shear=0.99, translate=32.0, rotate=135.0, enhance=0.99, posterize=6)


def encode_ops(ranges: Ranges, operation: Tensor, magnitude: Tensor, sign: Tensor) -> Tensor:
    """All that the three dense ops need, f32 [..., 10]: a matrix, kind and factor, kind and level.

    `operation` is a number of OPERATIONS; `strength` (0 ... STRENGTHS) and `sign` (-1 or 1) have its
    shape. An operation that has no sign or no strength does not look at it.
    """
    share = magnitude.double() / MAGNITUDES
    is_op = {name: operation == number for number, name in enumerate(OPERATIONS)}
    shear, angle = ranges.shear * share * sign, (ranges.rotate * share * sign).deg2rad()
    whole = (ranges.translate * share).floor() * sign  # whole pixels, so that none is blurred
    cosine, sine = (torch.where(is_op["rotate"], f, 0) for f in (angle.cos() - 1, angle.sin()))
    shear_x, shear_y = (torch.where(is_op[name], shear, 0) for name in WARPS[:2])
    shift_x, shift_y = (torch.where(is_op[name], whole, 0) for name in WARPS[2:4])
    matrix = (
        *(
            1 + cosine,
            shear_x - sine,
            shear_x * SIDE / 2 - shift_x,
        ),  # the corner stays in its place
        *(shear_y + sine, 1 + cosine, shear_y * SIDE / 2 - shift_y),
    )
    blended, looked_up, factor, level = (torch.zeros_like(share) for _ in range(4))
    for kind, name in enumerate(BLEND_OPS[1:], start=1):
        blended += kind * is_op[name]
    for kind, name in enumerate(LUT_OPS[1:], start=1):
        looked_up += kind * is_op[name]
    factor = torch.where(blended > 0, 1 + ranges.enhance * share * sign, 1)
    bits = 8 - (ranges.posterize * share).round()
    level = torch.where(is_op["posterize"], bits, 255 * (1 - share))
    return torch.stack([*matrix, blended, factor, looked_up, level], dim=-1).float()


def apply_operation(images: Tensor, column: Tensor) -> Tensor:
    """One operation a picture, by its f32 [B, 10] of `columns_of`."""
    matrix, (blended, factor, looked_up, level) = column[:, :6], column[:, 6:].unbind(1)
    images = warp(images, matrix, "nearest")
    return apply_lut(enhance(images, blended, factor), looked_up, level)


def draw_operations(draws: KeyedRandom, applied: Tensor, *steps: int) -> tuple[Tensor, Tensor]:
    """Which operation at each step, identity where not `applied` (bool [N]), and its sign; int64."""
    operation = draws.integers("operation", 0, len(OPERATIONS), *steps)
    sign = 2 * draws.integers("sign", 0, 2, *steps) - 1
    return operation * applied[:, None], sign


@config
class RandAugment:
    """`num_ops` operations after each other, each any of 14, all of one `magnitude`, 0 ... 30.

    Cubuk et al. 2019, arXiv 1909.13719, in the ranges of AutoAugment.
    """

    num_ops: Count = 2
    magnitude: Magnitude = 9
    p: Fraction = 1.0

    def draw(self, draws: KeyedRandom, applied: Tensor) -> Tensor:
        """f32 [N, num_ops, 10]."""
        operation, sign = draw_operations(draws, applied, self.num_ops)
        strength = torch.full_like(operation, self.magnitude)
        return encode_ops(AUTO_RANGES, operation, strength, sign)

    def __call__(self, images: Tensor, column: Tensor) -> Tensor:
        for step in column.unbind(1):
            images = apply_operation(images, step)
        return images


@config
class TrivialAugment:
    """One operation, any of 14, of any of 31 magnitudes: TrivialAugment Wide.

    Müller and Hutter 2021, arXiv 2103.10158.
    """

    p: Fraction = 1.0

    def draw(self, draws: KeyedRandom, applied: Tensor) -> Tensor:
        """f32 [N, 1, 10]."""
        operation, sign = draw_operations(draws, applied, 1)
        strength = draws.integers("strength", 0, MAGNITUDES + 1, 1)
        return encode_ops(WIDE_RANGES, operation, strength, sign)

    def __call__(self, images: Tensor, column: Tensor) -> Tensor:
        return apply_operation(images, column[:, 0])
