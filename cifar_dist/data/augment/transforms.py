"""Image transforms of a recipe other than crop, flips, cutout and mixing.

One class holds the options and the formula of a transform; its parameters are one column of the
epoch's table. RandAugment and TrivialAugment are in policies.py.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Annotated, Any, Literal, Protocol

import torch
from annotated_types import Interval
from torch import Tensor

from cifar_dist.data.augment.image_ops import (
    Interpolation,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    box_mask,
    erase,
    fill_mean,
    noise,
    shift_hue,
    warp,
)
from cifar_dist.data.augment.policies import AutoAugment, RandAugment, TrivialAugment
from cifar_dist.utils.config import Fraction, NonNegative, Positive, config
from cifar_dist.utils.random import KeyedRandom

HalfTurn = Annotated[float, Interval(ge=0, le=0.5)]
Angle = Annotated[float, Interval(ge=0, le=180)]
Area = Annotated[float, Interval(gt=0, le=1)]
ERASE_TRIES = 10  # boxes drawn for an image before giving up


class Transform(Protocol):
    """Interface of a transform.

    `draw` returns the parameters of N rows, whose images have S = `image_size`; for rows that are not
    `applied` (bool [N]), parameters that leave every bit of an image unchanged.
    """

    @property
    def p(self) -> float: ...
    def draw(self, random: KeyedRandom, applied: Tensor, image_size: int) -> Tensor: ...  # [N, ...]
    def __call__(self, images: Tensor, column: Tensor) -> Tensor: ...  # uint8 [B, 3, S, S]


@config
class Affine:
    """Rotate, translate and scale about the center, like torchvision's RandomAffine."""

    degrees: Angle = 0.0  # the angle is uniform in [-degrees, degrees]
    translate: Fraction = 0.0  # maximum shift as a fraction of the side, not rounded to pixels
    scale: tuple[Positive, Positive] = (1.0, 1.0)  # range of the scale factor; above 1 enlarges
    interpolation: Interpolation = "bilinear"  # method of resampling
    p: Fraction = 1.0  # probability; inside one_of a weight

    def __post_init__(self) -> None:
        check_range("scale", self.scale)

    def draw(self, random: KeyedRandom, applied: Tensor, image_size: int) -> Tensor:
        """Return inverse affine matrices, from output to input pixels, f32 [N, 6] as in `warp`."""
        angle = random.uniform("angle", -self.degrees, self.degrees).deg2rad()
        reach = self.translate * image_size
        x, y = (random.uniform(name, -reach, reach) for name in ("shift_x", "shift_y"))
        scale = random.uniform("scale", *self.scale)
        cosine, sine = angle.cos() / scale, angle.sin() / scale
        inverse = (cosine, sine, -cosine * x - sine * y, -sine, cosine, sine * x - cosine * y)
        identity = torch.eye(2, 3, dtype=torch.float64).flatten()
        return torch.where(applied[:, None], torch.stack(inverse, dim=1), identity).float()

    def __call__(self, images: Tensor, column: Tensor) -> Tensor:
        return warp(images, column, self.interpolation)


@config
class ColorJitter:
    """Jitter brightness, contrast, saturation and hue, like torchvision's, but in this fixed order.

    Factors are uniform in [max(0, 1 - x), 1 + x]; the hue shifts by up to x of the color wheel.
    """

    brightness: NonNegative = 0.0  # the factor is uniform in 1 - x to 1 + x, at least 0
    contrast: NonNegative = 0.0  # the factor is uniform in 1 - x to 1 + x, at least 0
    saturation: NonNegative = 0.0  # the factor is uniform in 1 - x to 1 + x, at least 0
    hue: HalfTurn = 0.0  # the shift is uniform in -x to x turns of the color wheel
    p: Fraction = 1.0  # probability; inside one_of a weight

    def draw(self, random: KeyedRandom, applied: Tensor, image_size: int) -> Tensor:
        """Return three factors and a hue shift, f32 [N, 4]."""
        options = {name: getattr(self, name) for name in ("brightness", "contrast", "saturation")}
        factors = [random.uniform(name, max(0.0, 1 - x), 1 + x) for name, x in options.items()]
        columns = torch.stack([*factors, random.uniform("hue", -self.hue, self.hue)], dim=1)
        identity = torch.ones(4) - torch.eye(4)[3]
        return torch.where(applied[:, None], columns, identity).float()

    def __call__(self, images: Tensor, column: Tensor) -> Tensor:
        brightness, contrast, saturation, hue = column.unbind(1)
        if self.brightness:
            images = adjust_brightness(images, brightness)
        if self.contrast:
            images = adjust_contrast(images, contrast)
        if self.saturation:
            images = adjust_saturation(images, saturation)
        return shift_hue(images, hue) if self.hue else images


@config
class Erasing:
    """Fill a box inside the image (random erasing, Zhong et al. 2020, arXiv 1708.04896).

    The ratio of height to width is uniform on a logarithmic scale, as in torchvision and timm.
    """

    area: tuple[Area, Area] = (0.02, 0.4)  # range of the area, as a fraction of the image
    ratio: tuple[Positive, Positive] = (0.3, 1 / 0.3)  # range of height / width
    fill: Literal["noise", "mean"] = "noise"  # uniform noise per pixel, or CIFAR-100's mean color
    p: Fraction = 1.0  # probability; inside one_of a weight; 0.5 in the paper

    def __post_init__(self) -> None:
        check_range("area", self.area)
        check_range("ratio", self.ratio)
        squarest = min(max(1.0, self.ratio[0]), self.ratio[1])
        longer = max(squarest, 1 / squarest)
        smallest, largest = self.area
        fits = round(32 * math.sqrt(smallest * longer)) < 32  # in pixels of a 32 px image
        if not fits or round(32 * math.sqrt(largest / longer)) < 1:
            raise ValueError(
                f"area={list(self.area)}, ratio={list(self.ratio)}: no such box is at least one pixel wide "
                "and smaller than the image, so nothing would be erased; choose other values"
            )

    def draw(self, random: KeyedRandom, applied: Tensor, image_size: int) -> Tensor:
        """Return top, bottom, left, right and the seed of the noise, int64 [N, 5]."""
        area = random.uniform("area", *self.area, ERASE_TRIES) * image_size**2
        low, high = (math.log(end) for end in self.ratio)
        ratio = random.uniform("ratio", low, high, ERASE_TRIES).exp()
        sizes = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=2).round()
        fits = (sizes < image_size).all(2) & (sizes > 0).all(2)  # [N, tries]
        first = fits.int().argmax(1)  # the first that fits; where none does, nothing is erased
        size = sizes[torch.arange(len(sizes)), first] * (fits.any(1) & applied)[:, None]
        start = (random.uniform("place", 0, 1, 2) * (image_size - size + 1)).floor()
        edges = torch.stack([start, start + size], dim=2).flatten(1)  # top, bottom, left, right
        return torch.cat([edges.long(), random.integers("noise", 0, 2**31, 1)], dim=1)

    def __call__(self, images: Tensor, column: Tensor) -> Tensor:
        if self.fill == "mean":
            return fill_mean(images, box_mask(column[:, :4], images.shape[-1]))
        return erase(images, column[:, :4], noise(column[:, 4], images.shape[-1]))


@config
class OneOf:
    """Apply exactly one of the given transforms with probability `p`.

    The `p` of a member is its weight; members have equal weights by default.
    """

    affine: Affine | None = None  # as augment.affine; null: not a choice
    color_jitter: ColorJitter | None = None  # as augment.color_jitter; null: not a choice
    auto_augment: AutoAugment | None = None  # as augment.auto_augment; null: not a choice
    rand_augment: RandAugment | None = None  # as augment.rand_augment; null: not a choice
    trivial_augment: TrivialAugment | None = None  # as augment.trivial_augment; null: not a choice
    erasing: Erasing | None = None  # as augment.erasing; null: not a choice
    p: Fraction = 1.0  # probability of applying one of them

    def __post_init__(self) -> None:
        members = named_transforms(self)
        if len(members) < 2 or not any(member.p for member in members.values()):
            raise ValueError("give at least two transforms, such as affine: {degrees: 15}")

    def draw(self, random: KeyedRandom, image_size: int) -> dict[str, Tensor]:
        """Return the column of each member; a row is applied in at most one of them."""
        members = named_transforms(self)
        weights = [member.p for member in members.values()]
        edges = [self.p * edge / sum(weights) for edge in accumulate(weights)]
        # An index beyond the last edge applies none of them.
        chosen = torch.searchsorted(
            torch.tensor(edges, dtype=torch.float64), random.uniform("place", 0, 1), right=True
        )
        return {
            name: member.draw(random.scoped(name), chosen == index, image_size)
            for index, (name, member) in enumerate(members.items())
        }


def named_transforms(options: Any) -> dict[str, Transform]:
    """Return the transforms among the fields of a config class by name, in order."""
    kinds = (Affine, ColorJitter, AutoAugment, RandAugment, TrivialAugment, Erasing)
    return {name: value for name, value in vars(options).items() if isinstance(value, kinds)}


def check_range(name: str, bounds: tuple[float, float]) -> None:
    if bounds[0] > bounds[1]:
        raise ValueError(f"{name}: the lower end must come first (got {list(bounds)})")
