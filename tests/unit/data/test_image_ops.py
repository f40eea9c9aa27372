"""Each image op against torchvision's function of the same name, per image, at equal parameters.

Color ops are exact against torchvision on PIL images, which uses Pillow; on tensors torchvision rounds
differently, so the difference is bounded.
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
    """Synthetic images and edge cases: noise, uniform, gray, black and white."""
    synthetic = load_split(data, "train").images
    noisy = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(0))
    flat = torch.tensor([0, 255, 7], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 32, 32)
    gray = noisy[:2, :1].expand(2, 3, 32, 32)
    few_levels = 100 + noisy[2:] % 3
    one_level = torch.full((1, 3, 32, 32), 9, dtype=torch.uint8)  # gives an equalize step of 0
    one_level[:, :, 3, 5] = 200
    return torch.cat([synthetic, noisy, flat, gray, few_levels, one_level])


def cycle(values: list[float], images: Tensor) -> Tensor:
    """Return one value per image, cycling through `values`, f32."""
    return torch.tensor(values).repeat(len(images))[: len(images)]


def with_pillow(function: Callable[..., Any], image: Tensor, *parameters: Any) -> Tensor:
    return vision.pil_to_tensor(function(vision.to_pil_image(image), *parameters))


def distance(ours: Tensor, other: Tensor) -> Tensor:
    return (ours.int() - other.int()).abs()


# ----------------------------------------------------------------------------- geometry


# Arguments of torchvision's `affine`, in which positive angles are clockwise.
AFFINE: list[dict[str, Any]] = [
    {"angle": 0.0, "translate": (3, -5), "scale": 1.0, "shear": (0.0, 0.0)},
    {"angle": 15.0, "translate": (0, 0), "scale": 1.0, "shear": (0.0, 0.0)},
    {"angle": -37.0, "translate": (2, 4), "scale": 0.8, "shear": (0.0, 0.0)},
    {"angle": 180.0, "translate": (-1, 0), "scale": 1.3, "shear": (10.0, -20.0)},
]


def inverse_matrix(angle: float, translate: Any, scale: float, shear: Any) -> Tensor:
    """Return the inverse of shift * rotation * shear_y * shear_x * scale, f32 [6]."""
    turn, slant = (torch.tensor(value).double().deg2rad() for value in (angle, shear))
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()]).view(2, 2)
    shear_x, shear_y = torch.eye(2).double(), torch.eye(2).double()
    shear_x[0, 1], shear_y[1, 0] = -slant[0].tan(), -slant[1].tan()
    linear = (rotation @ shear_y @ shear_x * scale).inverse()
    shift = -linear @ torch.tensor(translate).double()[:, None]
    return torch.cat([linear, shift], 1).flatten().float()


@pytest.mark.parametrize("case", AFFINE)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_warp_matches_torchvision(images: Tensor, case: dict[str, Any], interpolation: Any) -> None:
    """Bilinear values may differ by a rounding; nearest may choose another equally near pixel."""
    matrix = inverse_matrix(**case).expand(len(images), 6)
    ours = warp(images, matrix, interpolation)
    mode = vision.InterpolationMode(interpolation)
    theirs = torch.stack([vision.affine(one, interpolation=mode, **case) for one in images])
    different = distance(ours, theirs)
    assert different.double().count_nonzero() <= 0.002 * different.numel()
    if interpolation == "bilinear":
        assert different.max() <= 1
    if not case["angle"]:
        assert torch.equal(ours, theirs)


def test_warp_applies_one_matrix_per_image(images: Tensor) -> None:
    matrices = torch.stack([inverse_matrix(**case) for case in AFFINE])
    index = torch.arange(len(images)) % len(AFFINE)
    batch = warp(images, matrices[index], "bilinear")
    for row, i in enumerate(index.tolist()):
        single = warp(images[row : row + 1], matrices[i : i + 1], "bilinear")
        assert torch.equal(batch[row : row + 1], single)


# ----------------------------------------------------------------------------- colors

ADJUST = {
    "brightness": (adjust_brightness, vision.adjust_brightness, 0),
    "contrast": (adjust_contrast, vision.adjust_contrast, 2),
    "color": (adjust_saturation, vision.adjust_saturation, 2),
    "sharpness": (None, vision.adjust_sharpness, 1),
}


@pytest.mark.parametrize("name", ADJUST)
def test_blends_match_torchvision(images: Tensor, name: str) -> None:
    """Blends equal Pillow's. torchvision's grays on tensors are up to a level darker (the weights sum
    to 0.9999), and its mean is not rounded.
    """
    single, theirs, bound = ADJUST[name]
    factor = cycle(FACTORS, images)
    kind = torch.full((len(images),), BLEND_OPS.index(name))
    ours = enhance(images, kind, factor)
    if single:
        assert torch.equal(single(images, factor), ours)
    for row, image in enumerate(images):
        value = factor[row].item()
        assert torch.equal(ours[row], with_pillow(theirs, image, value)), (name, row, value)
        assert distance(ours[row], theirs(image, value)).max() <= bound, (name, row, value)


@pytest.mark.parametrize("shift", [-0.5, -0.21, -0.02, 0.0, 0.1, 1 / 3, 0.5])
def test_hue_matches_torchvision(images: Tensor, shift: float) -> None:
    """Levels are rounded here; torchvision nearly truncates them on tensors."""
    ours = shift_hue(images, torch.full((len(images),), shift))
    theirs = torch.stack([vision.adjust_hue(image, shift) for image in images])
    assert distance(ours, theirs).max() <= 1


def test_hue_shift_by_a_third_permutes_the_primaries() -> None:
    pixels = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [7, 7, 7]], dtype=torch.uint8)
    shifted = shift_hue(pixels.T[None, :, None], torch.tensor([1 / 3]))[0, :, 0].T
    assert shifted.tolist() == [[0, 255, 0], [0, 0, 255], [255, 0, 0], [7, 7, 7]]


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("posterize", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("solarize", [0, 1, 100, 128, 127.5, 255]),
        ("autocontrast", [0]),
        ("equalize", [0]),
    ],
)
def test_lookup_tables_match_torchvision(images: Tensor, name: str, levels: list[float]) -> None:
    """All are exact except autocontrast, which truncates the exact quotient: at most one level."""
    functions: dict[str, Callable[..., Any]] = {
        "posterize": vision.posterize,
        "solarize": vision.solarize,
        "autocontrast": vision.autocontrast,
        "equalize": vision.equalize,
    }
    level = cycle([float(value) for value in levels], images)
    ours = apply_lut(images, torch.full((len(images),), LUT_OPS.index(name)), level)
    bound = 1 if name == "autocontrast" else 0
    different = 0
    for row, image in enumerate(images):
        arguments: dict[str, list[float]] = {
            "posterize": [int(level[row])],
            "solarize": [level[row].item()],
        }
        value = arguments.get(name, [])
        for theirs in (
            functions[name](image, *value),
            with_pillow(functions[name], image, *value),
        ):
            assert distance(ours[row], theirs).max() <= bound, (name, row, value)
            different += int(distance(ours[row], theirs).sum())
    assert different <= 0.02 * 2 * images.numel()


def test_autocontrast_truncates_the_exact_quotient() -> None:
    image = torch.arange(20, 140).repeat(9)[:1024].view(1, 1, 32, 32).expand(1, 3, -1, -1)
    result = apply_lut(image.to(torch.uint8), torch.tensor([3]), torch.zeros(1))
    assert torch.equal(result[0, 0].int(), ((image[0, 0] - 20) * 255 // 119).int())


# ----------------------------------------------------------------------------- holes


def test_erase_and_fill_mean_match_torchvision(images: Tensor) -> None:
    boxes = torch.tensor([[0, 0, 0, 0], [3, 9, 0, 32], [31, 32, 31, 32], [5, 25, 8, 11]])
    box = boxes[torch.arange(len(images)) % 4]
    filling = noise(torch.arange(len(images)) * 1_000_003, 32)
    erased, covered = erase(images, box, filling), fill_mean(images, box_mask(box, 32))
    for row, (top, bottom, left, right) in enumerate(box.tolist()):
        area = (top, left, bottom - top, right - left)
        inner = filling[row, :, top:bottom, left:right]
        assert torch.equal(erased[row], vision.erase(images[row], *area, inner))
        color = torch.tensor(MEAN_COLOR, dtype=torch.uint8)[:, None, None]
        assert torch.equal(covered[row], vision.erase(images[row], *area, color))


def test_noise_is_uniform_and_uncorrelated() -> None:
    """Chi square of 256 bins, of values and of pairs at 4 bits: mean 255, standard deviation 23."""

    def chi_square(values: Tensor) -> float:
        counts = values.flatten().bincount(minlength=256).double()
        expected = counts.sum() / 256
        return float(((counts - expected).square() / expected).sum())

    seeds = torch.randint(0, 2**31, (1000,), generator=torch.manual_seed(0))
    values = noise(seeds, 32).long()
    assert chi_square(values) < 370
    for axis in range(4):
        count = values.shape[axis] - 1
        pairs = values.narrow(axis, 0, count) // 16 * 16 + values.narrow(axis, 1, count) // 16
        assert chi_square(pairs) < 370, axis
    assert torch.equal(noise(seeds[5:6], 32)[0].long(), values[5])


# ----------------------------------------------------------------------------- all ops

IDENTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "warp": lambda images: warp(images, IDENTITY.expand(len(images), 6), "nearest"),
    "bilinear": lambda images: warp(images, IDENTITY.expand(len(images), 6), "bilinear"),
    "brightness": lambda images: adjust_brightness(images, torch.ones(len(images))),
    "contrast": lambda images: adjust_contrast(images, torch.ones(len(images))),
    "saturation": lambda images: adjust_saturation(images, torch.ones(len(images))),
    "hue": lambda images: shift_hue(images, torch.zeros(len(images))),
    "enhance": lambda images: enhance(
        images, torch.arange(len(images)) % len(BLEND_OPS), torch.ones(len(images))
    ),
    "apply_lut": lambda images: apply_lut(
        images, torch.zeros(len(images)), torch.full((len(images),), 77.0)
    ),
    "erase": lambda images: erase(images, torch.zeros(len(images), 4).long(), 255 - images),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_parameters_change_no_bit(images: Tensor, name: str) -> None:
    assert torch.equal(IDENTITIES[name](images), images)
