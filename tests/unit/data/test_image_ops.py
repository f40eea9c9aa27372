"""Each op against torchvision's function of the same name, picture by picture, with the same parameter.

torchvision has two answers on colours: on PIL pictures it is Pillow, whose definitions these are, hence
exact; on tensors it rounds otherwise, hence a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision  # type: ignore[import-untyped]

from cifar_dist.data.augment.image_ops import (
    BLEND_OPS,
    LUT_OPS,
    MEAN_COLOR,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    apply_lut,
    box_mask,
    enhance,
    erase,
    fill_mean,
    noise,
    shift_hue,
    warp,
)
from cifar_dist.data.dataset import load_split

IDENTITY = torch.eye(2, 3).flatten()
FACTORS = [0.0, 0.01, 0.1, 0.4, 0.75, 1.0, 1.25, 1.6, 1.9, 1.99]


@pytest.fixture
def images(data: Path) -> Tensor:
    """Drawn pictures, and what ops divide by zero on or overflow at: flat, grey, black and white."""
    drawn = load_split(data, "train").images
    dice = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(0))
    flat = torch.tensor([0, 255, 7], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 32, 32)
    grey = dice[:2, :1].expand(2, 3, 32, 32)
    few = 100 + dice[2:] % 3  # an equalize step of 0 needs nearly all pixels in one level
    lone = torch.full((1, 3, 32, 32), 9, dtype=torch.uint8)
    lone[:, :, 3, 5] = 200
    return torch.cat([drawn, dice, flat, grey, few, lone])


def each_of(values: list[float], images: Tensor) -> Tensor:
    """One value a picture, in turn; f32."""
    return torch.tensor(values).repeat(len(images))[: len(images)]


def by_pillow(function: Callable[..., Any], picture: Tensor, *parameters: Any) -> Tensor:
    return vision.pil_to_tensor(function(vision.to_pil_image(picture), *parameters))


def distance(ours: Tensor, other: Tensor) -> Tensor:
    return (ours.int() - other.int()).abs()


# ----------------------------------------------------------------------------- where pixels are


# In torchvision's words; angles turn clockwise in `affine`.
AFFINE: list[dict[str, Any]] = [
    {"angle": 0.0, "translate": (3, -5), "scale": 1.0, "shear": (0.0, 0.0)},
    {"angle": 15.0, "translate": (0, 0), "scale": 1.0, "shear": (0.0, 0.0)},
    {"angle": -37.0, "translate": (2, 4), "scale": 0.8, "shear": (0.0, 0.0)},
    {"angle": 180.0, "translate": (-1, 0), "scale": 1.3, "shear": (10.0, -20.0)},
]


def matrix_of(angle: float, translate: Any, scale: float, shear: Any) -> Tensor:
    """The way back: the inverse of turn * shear_y * shear_x * scale, then of the shift; f32 [6]."""
    turn, lean = (torch.tensor(value).double().deg2rad() for value in (angle, shear))
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()]).view(2, 2)
    shear_x, shear_y = torch.eye(2).double(), torch.eye(2).double()
    shear_x[0, 1], shear_y[1, 0] = -lean[0].tan(), -lean[1].tan()
    back = (rotation @ shear_y @ shear_x * scale).inverse()
    return torch.cat([back, -back @ torch.tensor(translate).double()[:, None]], 1).flatten().float()


@pytest.mark.parametrize("case", AFFINE)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_warp(images: Tensor, case: dict[str, Any], interpolation: Any) -> None:
    """Bilinear: at most a level at a rounding. Nearest: another pixel where two are equally near."""
    matrix = matrix_of(**case).expand(len(images), 6)
    ours = warp(images, matrix, interpolation)
    mode = vision.InterpolationMode(interpolation)
    theirs = torch.stack([vision.affine(one, interpolation=mode, **case) for one in images])
    different = distance(ours, theirs)
    assert different.double().count_nonzero() <= 0.002 * different.numel()
    if interpolation == "bilinear":
        assert different.max() <= 1
    if not case["angle"]:
        assert torch.equal(ours, theirs)


def test_warp_has_a_matrix_for_each_picture(images: Tensor) -> None:
    matrices = torch.stack([matrix_of(**case) for case in AFFINE])
    which = torch.arange(len(images)) % len(AFFINE)
    together = warp(images, matrices[which], "bilinear")
    for row, place in enumerate(which.tolist()):
        alone = warp(images[row : row + 1], matrices[place : place + 1], "bilinear")
        assert torch.equal(together[row : row + 1], alone)


# ----------------------------------------------------------------------------- colours

ADJUST = {
    "brightness": (adjust_brightness, vision.adjust_brightness, 0),
    "contrast": (adjust_contrast, vision.adjust_contrast, 2),
    "color": (adjust_saturation, vision.adjust_saturation, 2),
    "sharpness": (None, vision.adjust_sharpness, 1),
}


@pytest.mark.parametrize("name", ADJUST)
def test_blends(images: Tensor, name: str) -> None:
    """Exact against Pillow; a tensor's grey is up to a level darker (its weights sum to 0.9999), a
    tensor's mean no whole level."""
    own, theirs, bound = ADJUST[name]
    factor = each_of(FACTORS, images)
    kind = torch.full((len(images),), BLEND_OPS.index(name))
    ours = enhance(images, kind, factor)
    if own:
        assert torch.equal(own(images, factor), ours)
    for row, picture in enumerate(images):
        value = factor[row].item()
        assert torch.equal(ours[row], by_pillow(theirs, picture, value)), (name, row, value)
        assert distance(ours[row], theirs(picture, value)).max() <= bound, (name, row, value)


@pytest.mark.parametrize("turn", [-0.5, -0.21, -0.02, 0.0, 0.1, 1 / 3, 0.5])
def test_hue(images: Tensor, turn: float) -> None:
    """We round to the nearest level, torchvision's tensors nearly drop the fraction."""
    ours = shift_hue(images, torch.full((len(images),), turn))
    theirs = torch.stack([vision.adjust_hue(picture, turn) for picture in images])
    assert distance(ours, theirs).max() <= 1
    pixels = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [7, 7, 7]], dtype=torch.uint8)
    turned = shift_hue(pixels.T[None, :, None], torch.tensor([1 / 3]))[0, :, 0].T
    assert turned.tolist() == [[0, 255, 0], [0, 0, 255], [255, 0, 0], [7, 7, 7]]


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("posterize", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("solarize", [0, 1, 100, 128, 127.5, 255]),
        ("autocontrast", [0]),
        ("equalize", [0]),
    ],
)
def test_look_ups(images: Tensor, name: str, levels: list[float]) -> None:
    """Exact, but that autocontrast drops fractions of the true quotient: at most a level."""
    functions: dict[str, Callable[..., Any]] = {
        "posterize": vision.posterize,
        "solarize": vision.solarize,
        "autocontrast": vision.autocontrast,
        "equalize": vision.equalize,
    }
    level = each_of([float(value) for value in levels], images)
    ours = apply_lut(images, torch.full((len(images),), LUT_OPS.index(name)), level)
    bound = 1 if name == "autocontrast" else 0
    different = 0
    for row, picture in enumerate(images):
        knobs: dict[str, list[float]] = {
            "posterize": [int(level[row])],
            "solarize": [level[row].item()],
        }
        value = knobs.get(name, [])
        for theirs in (
            functions[name](picture, *value),
            by_pillow(functions[name], picture, *value),
        ):
            assert distance(ours[row], theirs).max() <= bound, (name, row, value)
            different += int(distance(ours[row], theirs).sum())
    assert different <= 0.02 * 2 * images.numel()


def test_autocontrast_is_the_whole_part_of_the_quotient() -> None:
    picture = torch.arange(20, 140).repeat(9)[:1024].view(1, 1, 32, 32).expand(1, 3, -1, -1)
    found = apply_lut(picture.to(torch.uint8), torch.tensor([3]), torch.zeros(1))
    assert torch.equal(found[0, 0].int(), ((picture[0, 0] - 20) * 255 // 119).int())


# ----------------------------------------------------------------------------- holes


def test_erase(images: Tensor) -> None:
    boxes = torch.tensor([[0, 0, 0, 0], [3, 9, 0, 32], [31, 32, 31, 32], [5, 25, 8, 11]])
    box = boxes[torch.arange(len(images)) % 4]
    filling = noise(torch.arange(len(images)) * 1_000_003)
    erased, covered = erase(images, box, filling), fill_mean(images, box_mask(box))
    for row, (top, bottom, left, right) in enumerate(box.tolist()):
        place = (top, left, bottom - top, right - left)
        inner = filling[row, :, top:bottom, left:right]
        assert torch.equal(erased[row], vision.erase(images[row], *place, inner))
        colour = torch.tensor(MEAN_COLOR, dtype=torch.uint8)[:, None, None]
        assert torch.equal(covered[row], vision.erase(images[row], *place, colour))


def test_noise_is_even_and_without_a_pattern() -> None:
    """Chi square of 256 bins, alone and of pairs of 16: mean 255, standard deviation 23."""

    def chi_square(values: Tensor) -> float:
        counts = values.flatten().bincount(minlength=256).double()
        expected = counts.sum() / 256
        return float(((counts - expected).square() / expected).sum())

    seeds = torch.randint(0, 2**31, (1000,), generator=torch.manual_seed(0))
    drawn = noise(seeds).long()
    assert chi_square(drawn) < 370
    for axis in range(4):
        many = drawn.shape[axis] - 1
        pairs = drawn.narrow(axis, 0, many) // 16 * 16 + drawn.narrow(axis, 1, many) // 16
        assert chi_square(pairs) < 370, axis
    assert torch.equal(noise(seeds[5:6])[0].long(), drawn[5])


# ----------------------------------------------------------------------------- all of them

NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "warp": lambda images: warp(images, IDENTITY.expand(len(images), 6), "nearest"),
    "bilinear": lambda images: warp(images, IDENTITY.expand(len(images), 6), "bilinear"),
    "brightness": lambda images: adjust_brightness(images, torch.ones(len(images))),
    "contrast": lambda images: adjust_contrast(images, torch.ones(len(images))),
    "saturation": lambda images: adjust_saturation(images, torch.ones(len(images))),
    "hue": lambda images: shift_hue(images, torch.zeros(len(images))),
    "enhance": lambda images: enhance(
        images, torch.arange(len(images)) % len(BLEND_OPS), torch.ones(len(images))
    ),
    "look_up": lambda images: apply_lut(
        images, torch.zeros(len(images)), torch.full((len(images),), 77.0)
    ),
    "erase": lambda images: erase(images, torch.zeros(len(images), 4).long(), 255 - images),
}


@pytest.mark.parametrize("name", NOTHING)
def test_the_parameter_of_no_change_changes_no_bit(images: Tensor, name: str) -> None:
    assert torch.equal(NOTHING[name](images), images)
