"""The device's changes and albumentations' of the same meaning: the same pictures on average.

3,000 keys of one picture each; a pixel's mean may differ by five standard errors and by rounding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.data.changes import Affine, Change, ColorJitter, Erasing
from cifar_dist.data.host_pipeline import Pipeline
from cifar_dist.data.image_ops import MEAN_COLOUR
from cifar_dist.keys import Draws

KEYS = 3000


@pytest.fixture(scope="module")
def picture() -> Tensor:
    """Smooth, as interpolations differ in what they do to noise; uint8 [3, 32, 32]."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.manual_seed(0)) * 255
    return F.interpolate(coarse, size=32, mode="bilinear")[0].round().to(torch.uint8)


def host(name: str, picture: Tensor, **arguments: Any) -> Tensor:
    pipeline = Pipeline([{name: {**arguments, "p": 1.0}}])
    image = picture.numpy()
    return torch.from_numpy(np.stack([pipeline(image, 0, row) for row in range(KEYS)]))


def device(change: Change, picture: Tensor) -> Tensor:
    column = change.draw(Draws(what="parity", seed=0, view=0, rows=KEYS), torch.ones(KEYS).bool())
    return change(picture.expand(KEYS, -1, -1, -1), column)


def assert_alike(one: Tensor, other: Tensor, *, rounding: float, spread: float = 0.1) -> None:
    """Means of each level and the spread of all; `rounding` in levels, `spread` relative."""
    one, other = one.double(), other.double()
    error = ((one.var(0) + other.var(0)) / KEYS).sqrt()
    excess = (one.mean(0) - other.mean(0)).abs() - 5 * error
    assert float(excess.max()) <= rounding
    deviations = [float(pictures.std(0).mean()) for pictures in (one, other)]
    assert deviations[0] == pytest.approx(deviations[1], rel=spread)


BLACK = {"interpolation": 1, "border_mode": 0, "fill": 0}


def test_turning_and_scaling(picture: Tensor) -> None:
    """Its shifts are other ones: whole pixels, cut towards zero."""
    one = host("Affine", picture, rotate=[-20, 20], scale=[0.8, 1.2], keep_ratio=True, **BLACK)
    change = Affine(degrees=20, scale=(0.8, 1.2))
    assert_alike(one, device(change, picture), rounding=0.5)


def test_turning_by_shift_scale_rotate(picture: Tensor) -> None:
    """Its scale is another one: a factor of its own for each side."""
    none = {"shift_limit": [0, 0], "scale_limit": [0, 0]}
    one = host("ShiftScaleRotate", picture, rotate_limit=[-45, 45], **none, **BLACK)
    assert_alike(one, device(Affine(degrees=45), picture), rounding=0.5)


def test_shifts_are_whole_pixels_there(picture: Tensor) -> None:
    """An albumentations shift by 3.9 pixels is ours by 3."""
    pipeline = Pipeline([{"Affine": {"translate_percent": [3.9 / 32, 3.9 / 32], "p": 1.0}}])
    back = torch.tensor([[1.0, 0, -3, 0, 1, -3]])
    shifted = Affine(translate=0.1)(picture[None], back)[0]
    assert torch.equal(torch.from_numpy(pipeline(picture.numpy(), 0, 0).copy()), shifted)


@pytest.mark.parametrize("angle", [-30.0, 90.0])
def test_a_turn_of_one_picture(picture: Tensor, angle: float) -> None:
    """Positive angles turn against the clock there; the interpolations differ by a level or so."""
    pipeline = Pipeline([{"Affine": {"rotate": [angle, angle], "p": 1.0}}])
    turned = torch.from_numpy(pipeline(picture.numpy(), 0, 0).copy())
    radians = torch.tensor(angle).deg2rad().item()
    cosine, sine = math.cos(radians), -math.sin(radians)
    back = torch.tensor([[cosine, sine, 0, -sine, cosine, 0]])
    ours = Affine(degrees=abs(angle))(picture[None], back)[0]
    assert float((ours.int() - turned.int()).abs().double().mean()) < 1.0


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_color_jitter(picture: Tensor, name: str) -> None:
    """Factor by factor, as albumentations shuffles their order; its hues are even degrees."""
    reach = 0.1 if name == "hue" else 0.4
    centre = 0.0 if name == "hue" else 1.0
    arguments: dict[str, Any] = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    arguments[name] = [centre - reach, centre + reach]
    one = host("ColorJitter", picture, **arguments)
    assert_alike(one, device(ColorJitter(**{name: reach}), picture), rounding=2)


def test_coarse_dropout_with_one_hole_is_erasing(picture: Tensor) -> None:
    """How often each pixel is covered by an 8 x 8 hole that lies whole in the picture."""
    covered = torch.zeros_like(picture)  # the mean colour shows on black
    arguments: dict[str, Any] = {
        "num_holes_range": [1, 1],
        "hole_height_range": [0.25, 0.25],
        "hole_width_range": [0.25, 0.25],
        "fill": list(MEAN_COLOUR),
    }
    erasing = Erasing(area=(1 / 16, 1 / 16), ratio=(1.0, 1.0), fill="mean")
    one, other = host("CoarseDropout", covered, **arguments), device(erasing, covered)
    for holes in (one, other):
        assert ((holes != 0).all(1).sum((1, 2)) == 64).all()
    assert_alike(one, other, rounding=1)
