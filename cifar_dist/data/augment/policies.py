"""AutoAugment, RandAugment and TrivialAugment over the usual 14 operations.

Each image gets one of the 14 operations per step. All are expressed by three batched ops: five are a
warp (a matrix), four a blend (with another image by a factor), four a lookup table, and one is the
identity. The ops that an image does not use get parameters that leave it unchanged.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from cifar_dist.data.augment.image_ops import BLEND_OPS, LUT_OPS, apply_lut, enhance, warp
from cifar_dist.utils.config import Count, Fraction, config
from cifar_dist.utils.random import KeyedRandom

WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
OPERATIONS = ("identity", *WARPS, *BLEND_OPS[1:], *LUT_OPS[1:])
MAGNITUDES = 30  # the highest magnitude; the lowest is 0

Magnitude = Annotated[int, Interval(ge=0, le=MAGNITUDES)]


@config
class Ranges:
    """The strength of each operation at the highest magnitude."""

    shear: float  # tangent of the angle
    translate: float  # pixels of a 32 px image
    rotate: float  # degrees
    enhance: float  # distance of the blend factor from 1
    posterize: int  # number of the 8 bits that are removed


# Cubuk et al. 2018 (AutoAugment, arXiv 1805.09501), table 6; 150 of 331 pixels as in its code and in torchvision
AUTO_RANGES = Ranges(shear=0.3, translate=150 / 331 * 32, rotate=30.0, enhance=0.9, posterize=4)
# Müller and Hutter 2021 (TrivialAugment, arXiv 2103.10158), the wide space
WIDE_RANGES = Ranges(shear=0.99, translate=32.0, rotate=135.0, enhance=0.99, posterize=6)

# Operation, probability, magnitude (0 to 9) of the two steps of each sub-policy, found on CIFAR-10 (Cubuk et al. 2018,
# table 7). Inverting is solarizing at magnitude 9, with threshold 0.
AUTO_POLICY = (
    (("solarize", 0.1, 9), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("solarize", 0.0, 9)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("solarize", 0.1, 9)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
)


def encode_ops(
    ranges: Ranges, operation: Tensor, magnitude: Tensor, sign: Tensor, *, image_size: int
) -> Tensor:
    """Return the parameters of the three batched ops, f32 [..., 10].

    They are an affine matrix (6), blend kind and factor, lookup kind and level. `operation` is an
    index into OPERATIONS; `magnitude` (0 ... MAGNITUDES) and `sign` (-1 or 1) have the same shape.
    Operations without a magnitude or a sign ignore it. Translations scale with the image size.
    """
    strength = magnitude.double() / MAGNITUDES
    is_op = {name: operation == index for index, name in enumerate(OPERATIONS)}
    shear, angle = ranges.shear * strength * sign, (ranges.rotate * strength * sign).deg2rad()
    translate = ranges.translate * image_size / 32
    shift = (translate * strength).floor() * sign  # whole pixels avoid blur
    cosine, sine = (torch.where(is_op["rotate"], f, 0) for f in (angle.cos() - 1, angle.sin()))
    shear_x, shear_y = (torch.where(is_op[name], shear, 0) for name in WARPS[:2])
    shift_x, shift_y = (torch.where(is_op[name], shift, 0) for name in WARPS[2:4])
    matrix = (  # shears keep the upper left corner fixed
        *(1 + cosine, shear_x - sine, shear_x * image_size / 2 - shift_x),
        *(shear_y + sine, 1 + cosine, shear_y * image_size / 2 - shift_y),
    )
    blend_kind, lut_kind = torch.zeros_like(strength), torch.zeros_like(strength)
    for kind, name in enumerate(BLEND_OPS[1:], start=1):
        blend_kind += kind * is_op[name]
    for kind, name in enumerate(LUT_OPS[1:], start=1):
        lut_kind += kind * is_op[name]
    factor = torch.where(blend_kind > 0, 1 + ranges.enhance * strength * sign, 1)
    bits = 8 - (ranges.posterize * strength).round()
    level = torch.where(is_op["posterize"], bits, 255 * (1 - strength))
    return torch.stack([*matrix, blend_kind, factor, lut_kind, level], dim=-1).float()


def apply_operation(images: Tensor, column: Tensor) -> Tensor:
    """Apply one operation to each image, given f32 [B, 10] of `encode_ops`."""
    matrix, (blend_kind, factor, lut_kind, level) = column[:, :6], column[:, 6:].unbind(1)
    images = warp(images, matrix, "nearest")
    return apply_lut(enhance(images, blend_kind, factor), lut_kind, level)


def draw_operations(random: KeyedRandom, applied: Tensor, *steps: int) -> tuple[Tensor, Tensor]:
    """Return the operation and the sign of each step, int64 [N, *steps].

    Rows that are not `applied` (bool [N]) get the identity.
    """
    operation = random.integers("operation", 0, len(OPERATIONS), *steps)
    sign = 2 * random.integers("sign", 0, 2, *steps) - 1
    return operation * applied[:, None], sign


def apply_operations(images: Tensor, column: Tensor) -> Tensor:
    """Apply K operations in sequence to each image, given f32 [B, K, 10]."""
    for step in column.unbind(1):
        images = apply_operation(images, step)
    return images


@config
class AutoAugment:
    """Apply one of the 25 pairs of operations of AutoAugment's policy for CIFAR.

    Each operation has its own probability and magnitude. Cubuk et al. 2018, arXiv 1805.09501, who use
    the policy that they found on CIFAR-10 on CIFAR-100 as well.
    """

    p: Fraction = 1.0  # probability; inside one_of a weight

    def draw(self, random: KeyedRandom, applied: Tensor, image_size: int) -> Tensor:
        """Return f32 [N, 2, 10]."""
        policy = torch.tensor(
            [
                [(OPERATIONS.index(name), p, magnitude) for name, p, magnitude in pair]
                for pair in AUTO_POLICY
            ],
            dtype=torch.float64,
        )
        operation, p, magnitude = policy[random.integers("policy", 0, len(policy))].unbind(2)
        is_applied = applied[:, None] & (random.uniform("operation", 0, 1, 2) < p)
        sign = 2 * random.integers("sign", 0, 2, 2) - 1
        magnitude = magnitude * MAGNITUDES / 9
        return encode_ops(
            AUTO_RANGES, operation.long() * is_applied, magnitude, sign, image_size=image_size
        )

    def __call__(self, images: Tensor, column: Tensor) -> Tensor:
        return apply_operations(images, column)


@config
class RandAugment:
    """Apply `num_ops` random operations out of 14 in sequence, all with the same `magnitude` (0 to 30).

    Cubuk et al. 2019, arXiv 1909.13719, with the ranges of AutoAugment.
    """

    num_ops: Count = 2  # operations per image
    magnitude: Magnitude = 9  # strength of all operations
    p: Fraction = 1.0  # probability; inside one_of a weight

    def draw(self, random: KeyedRandom, applied: Tensor, image_size: int) -> Tensor:
        """Return f32 [N, num_ops, 10]."""
        operation, sign = draw_operations(random, applied, self.num_ops)
        magnitude = torch.full_like(operation, self.magnitude)
        return encode_ops(AUTO_RANGES, operation, magnitude, sign, image_size=image_size)

    def __call__(self, images: Tensor, column: Tensor) -> Tensor:
        return apply_operations(images, column)


@config
class TrivialAugment:
    """Apply one random operation out of 14 with a random magnitude out of 31 (TrivialAugment Wide).

    Müller and Hutter 2021, arXiv 2103.10158.
    """

    p: Fraction = 1.0  # probability; inside one_of a weight

    def draw(self, random: KeyedRandom, applied: Tensor, image_size: int) -> Tensor:
        """Return f32 [N, 1, 10]."""
        operation, sign = draw_operations(random, applied, 1)
        magnitude = random.integers("strength", 0, MAGNITUDES + 1, 1)
        return encode_ops(WIDE_RANGES, operation, magnitude, sign, image_size=image_size)

    def __call__(self, images: Tensor, column: Tensor) -> Tensor:
        return apply_operations(images, column)
