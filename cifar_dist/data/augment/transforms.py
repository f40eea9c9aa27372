"""Floor 1. What a recipe can have done to its pictures beside crop, flip and mixing, by a column each.

The knobs and the formula of a change are one class. Automatic ones are in policies.py.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Annotated, Any, Literal, Protocol

import torch
from annotated_types import Interval
from torch import Tensor

from cifar_dist.data.augment.image_ops import (
    SIDE,
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
from cifar_dist.data.augment.policies import RandAugment, TrivialAugment
from cifar_dist.utils.config import Fraction, NonNegative, Positive, config
from cifar_dist.utils.random import KeyedRandom

HalfTurn = Annotated[float, Interval(ge=0, le=0.5)]
Angle = Annotated[float, Interval(ge=0, le=180)]
Area = Annotated[float, Interval(gt=0, le=1)]
ERASE_TRIES = 10  # boxes drawn for a picture before it stays whole


class Transform(Protocol):
    """What may change a picture, by one column of the table; the knobs and the formula in one class.

    Where it is not `applied` (bool [N]), `draw` gives the column that leaves a picture as it is.
    """

    @property
    def p(self) -> float: ...
    def draw(self, draws: KeyedRandom, applied: Tensor) -> Tensor: ...  # [N, ...]
    def __call__(self, images: Tensor, column: Tensor) -> Tensor: ...  # uint8 [B, 3, 32, 32]


@config
class Affine:
    """Rotate, shift and scale about the centre; black outside. As torchvision's RandomAffine."""

    degrees: Angle = 0.0  # the angle is uniform in -degrees ... degrees
    translate: Fraction = 0.0  # of a side, each way, right and down; parts of pixels, too
    scale: tuple[Positive, Positive] = (1.0, 1.0)  # above 1 enlarges
    interpolation: Interpolation = "bilinear"
    p: Fraction = 1.0

    def __post_init__(self) -> None:
        check_range("scale", self.scale)

    def draw(self, draws: KeyedRandom, applied: Tensor) -> Tensor:
        """The way back, from where a pixel is to where it came from: f32 [N, 6] as `warp` takes it."""
        angle = draws.uniform("angle", -self.degrees, self.degrees).deg2rad()
        reach = self.translate * SIDE
        x, y = (draws.uniform(name, -reach, reach) for name in ("shift_x", "shift_y"))
        scale = draws.uniform("scale", *self.scale)
        cosine, sine = angle.cos() / scale, angle.sin() / scale
        back = (cosine, sine, -cosine * x - sine * y, -sine, cosine, sine * x - cosine * y)
        identity = torch.eye(2, 3, dtype=torch.float64).flatten()
        return torch.where(applied[:, None], torch.stack(back, dim=1), identity).float()

    def __call__(self, images: Tensor, column: Tensor) -> Tensor:
        return warp(images, column, self.interpolation)


@config
class ColorJitter:
    """Change brightness, then contrast, saturation and hue. As torchvision's, in this order always.

    Factors are uniform in 1 - x ... 1 + x, not below 0; the hue turns by up to x of the colour wheel.
    """

    brightness: NonNegative = 0.0
    contrast: NonNegative = 0.0
    saturation: NonNegative = 0.0
    hue: HalfTurn = 0.0
    p: Fraction = 1.0

    def draw(self, draws: KeyedRandom, applied: Tensor) -> Tensor:
        """f32 [N, 4]: three factors and a turn."""
        factors = [
            draws.uniform(name, max(0.0, 1 - reach), 1 + reach)
            for name, reach in (
                ("brightness", self.brightness),
                ("contrast", self.contrast),
                ("saturation", self.saturation),
            )
        ]
        drawn = torch.stack([*factors, draws.uniform("hue", -self.hue, self.hue)], dim=1)
        identity = torch.ones(4) - torch.eye(4)[3]
        return torch.where(applied[:, None], drawn, identity).float()

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
    """Fill a box that lies whole in the picture (random erasing, Zhong et al. 2020, arXiv 1708.04896).

    The ratio of height to width is uniform on a logarithmic scale, as torchvision and timm have it.
    """

    area: tuple[Area, Area] = (0.02, 0.4)  # of the picture
    ratio: tuple[Positive, Positive] = (0.3, 1 / 0.3)
    fill: Literal["noise", "mean"] = (
        "noise"  # each level of each pixel uniform, or CIFAR-100's mean
    )
    p: Fraction = 1.0  # the paper's is 0.5

    def __post_init__(self) -> None:
        check_range("area", self.area)
        check_range("ratio", self.ratio)
        squarest = min(max(1.0, self.ratio[0]), self.ratio[1])
        longer = max(squarest, 1 / squarest)
        smallest, largest = self.area
        fits = round(SIDE * math.sqrt(smallest * longer)) < SIDE
        if not fits or round(SIDE * math.sqrt(largest / longer)) < 1:
            raise ValueError(
                f"area={list(self.area)}, ratio={list(self.ratio)}: no such box is a pixel wide and smaller "
                "than the picture, so nothing would be erased: give others"
            )

    def draw(self, draws: KeyedRandom, applied: Tensor) -> Tensor:
        """int64 [N, 5]: top, bottom, left, right and the seed of the noise."""
        area = draws.uniform("area", *self.area, ERASE_TRIES) * SIDE**2
        narrow, tall = (math.log(end) for end in self.ratio)
        ratio = draws.uniform("ratio", narrow, tall, ERASE_TRIES).exp()
        sizes = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=2).round()
        fits = (sizes < SIDE).all(2) & (sizes > 0).all(2)  # [N, tries]
        first = fits.int().argmax(1)  # the first that fits; where none does, nothing is erased
        size = sizes[torch.arange(len(sizes)), first] * (fits.any(1) & applied)[:, None]
        start = (draws.uniform("place", 0, 1, 2) * (SIDE - size + 1)).floor()
        edges = torch.stack([start, start + size], dim=2).flatten(1)  # top, bottom, left, right
        return torch.cat([edges.long(), draws.integers("noise", 0, 2**31, 1)], dim=1)

    def __call__(self, images: Tensor, column: Tensor) -> Tensor:
        if self.fill == "mean":
            return fill_mean(images, box_mask(column[:, :4]))
        return erase(images, column[:, :4], noise(column[:, 4]))


@config
class OneOf:
    """Exactly one of those that are named changes a picture, with `probability`.

    Which one is drawn in proportion to their own probabilities, which are equal where not given.
    """

    affine: Affine | None = None
    color_jitter: ColorJitter | None = None
    rand_augment: RandAugment | None = None
    trivial_augment: TrivialAugment | None = None
    erasing: Erasing | None = None
    p: Fraction = 1.0

    def __post_init__(self) -> None:
        named = named_transforms(self)
        if len(named) < 2 or not any(change.p for change in named.values()):
            raise ValueError("name at least two to choose from, like affine: {degrees: 15}")

    def draw(self, draws: KeyedRandom) -> dict[str, Tensor]:
        """The columns of the members; a row is applied in one of them at most."""
        members = named_transforms(self)
        weights = [change.p for change in members.values()]
        edges = [self.p * edge / sum(weights) for edge in accumulate(weights)]
        # beyond the last edge: none of them
        place = torch.searchsorted(
            torch.tensor(edges, dtype=torch.float64), draws.uniform("place", 0, 1), right=True
        )
        return {
            name: change.draw(draws.scoped(name), place == number)
            for number, (name, change) in enumerate(members.items())
        }


def named_transforms(knobs: Any) -> dict[str, Transform]:
    """The changes among the fields of a config class, by name, in their order."""
    kinds = (Affine, ColorJitter, RandAugment, TrivialAugment, Erasing)
    return {name: value for name, value in vars(knobs).items() if isinstance(value, kinds)}


def check_range(name: str, bounds: tuple[float, float]) -> None:
    if bounds[0] > bounds[1]:
        raise ValueError(f"{name}: write the lower end first, not {list(bounds)}")
