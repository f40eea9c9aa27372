"""The device's changes and albumentations' of the same meaning: the same distribution of pictures.

Thousands of keys of one picture each. A level's mean may differ by five standard errors and by
rounding, its whole distribution by what two samples of one distribution differ; so may parameters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.data.augment.albumentations_pipeline import Pipeline, load_library
from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.augment.image_ops import BLEND_OPS, LUT_OPS, MEAN_COLOR
from cifar_dist.data.augment.policies import RandAugment
from cifar_dist.data.augment.transforms import Affine, ColorJitter, Erasing, Transform
from cifar_dist.data.batches import gather_batch
from cifar_dist.data.dataset import Split
from cifar_dist.utils.random import KeyedRandom

KEYS = 3000


@pytest.fixture(scope="module")
def picture() -> Tensor:
    """Smooth, as interpolations differ in what they do to noise; uint8 [3, 32, 32]."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.manual_seed(0)) * 255
    return F.interpolate(coarse, size=32, mode="bilinear")[0].round().to(torch.uint8)


def host(transforms: list[Any], picture: Tensor, keys: int = KEYS) -> Tensor:
    pipeline, image = Pipeline(transforms), picture.numpy()
    return torch.from_numpy(np.stack([pipeline(image, 0, row) for row in range(keys)]))


def alone(name: str, picture: Tensor, **arguments: Any) -> Tensor:
    return host([{name: {**arguments, "p": 1.0}}], picture)


def columns(change: Transform, keys: int = KEYS) -> Tensor:
    return change.draw(
        KeyedRandom(what="parity", seed=0, view=0, rows=keys), torch.ones(keys).bool()
    )


def device(change: Transform, picture: Tensor) -> Tensor:
    return change(picture.expand(KEYS, -1, -1, -1), columns(change))


def parameters(name: str, **arguments: Any) -> list[dict[str, Any]]:
    """What albumentations draws for one transform, KEYS times."""
    library = load_library()
    one = getattr(library, name)(**arguments, p=1.0)
    compose = library.Compose([one], save_applied_params=True, seed=0)
    blank = np.zeros((32, 32, 3), np.uint8)
    return [compose(image=blank)["applied_transforms"][0][1] for _ in range(KEYS)]


def furthest(samples: int, distributions: int = 1) -> float:
    """What Kolmogorov and Smirnov's distance of two samples exceeds once in 10^6, in any of so many."""
    return math.sqrt(math.log(2e6 * distributions) / samples)


def assert_same_draws(one: Any, other: Any) -> None:
    """By the largest distance of their distribution functions."""
    one, other = (np.sort(np.asarray(values, dtype=np.float64)) for values in (one, other))
    places = np.concatenate([one, other])
    shares = [np.searchsorted(values, places, "right") / len(values) for values in (one, other)]
    assert np.abs(shares[0] - shares[1]).max() < furthest(KEYS)


def shares_up_to(pictures: Tensor) -> np.ndarray:
    """Of each of a picture's numbers, how often it is at most 0, 1, ... 255: [3072, 256]."""
    flat = pictures.flatten(1).numpy()
    counts = np.zeros((flat.shape[1], 256))
    places = np.arange(flat.shape[1]) * 256
    for some in np.array_split(flat, -(-len(flat) // 500)):
        counts += np.bincount((some + places).ravel(), minlength=counts.size).reshape(counts.shape)
    return counts.cumsum(1) / len(flat)


def assert_alike(one: Tensor, other: Tensor, *, rounding: float, spread: float = 0.1) -> None:
    """Means and distributions of each level, the spread of all; `rounding` in levels, `spread` relative."""
    bound = furthest(len(one), one[0].numel())
    shares, shift = [shares_up_to(pictures) for pictures in (one, other)], math.ceil(rounding)
    for below, above in (shares, shares[::-1]):
        assert (below[:, : 256 - shift] - above[:, shift:]).max() < bound
    one, other = one.double(), other.double()
    error = ((one.var(0) + other.var(0)) / len(one)).sqrt()
    excess = (one.mean(0) - other.mean(0)).abs() - 5 * error
    assert float(excess.max()) <= rounding
    deviations = [float(pictures.std(0).mean()) for pictures in (one, other)]
    assert deviations[0] == pytest.approx(deviations[1], rel=spread)


BLACK = {"interpolation": 1, "border_mode": 0, "fill": 0}


def test_turning_and_scaling(picture: Tensor) -> None:
    """Its shifts are other ones: whole pixels, cut towards zero."""
    one = alone("Affine", picture, rotate=[-20, 20], scale=[0.8, 1.2], keep_ratio=True, **BLACK)
    change = Affine(degrees=20, scale=(0.8, 1.2))
    assert_alike(one, device(change, picture), rounding=0.5)


def test_turning_by_shift_scale_rotate(picture: Tensor) -> None:
    """Its scale is another one: a factor of its own for each side."""
    none = {"shift_limit": [0, 0], "scale_limit": [0, 0]}
    one = alone("ShiftScaleRotate", picture, rotate_limit=[-45, 45], **none, **BLACK)
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
    one = alone("ColorJitter", picture, **arguments)
    assert_alike(one, device(ColorJitter(**{name: reach}), picture), rounding=2)


def test_coarse_dropout_with_one_hole_is_erasing(picture: Tensor) -> None:
    """How often each pixel is covered by an 8 x 8 hole that lies whole in the picture."""
    covered = torch.zeros_like(picture)  # the mean colour shows on black
    arguments: dict[str, Any] = {
        "num_holes_range": [1, 1],
        "hole_height_range": [0.25, 0.25],
        "hole_width_range": [0.25, 0.25],
        "fill": list(MEAN_COLOR),
    }
    erasing = Erasing(area=(1 / 16, 1 / 16), ratio=(1.0, 1.0), fill="mean")
    one, other = alone("CoarseDropout", covered, **arguments), device(erasing, covered)
    for holes in (one, other):
        assert ((holes != 0).all(1).sum((1, 2)) == 64).all()
    assert_alike(one, other, rounding=1)


# ----------------------------------------------------------------------------- flips


def test_flips(picture: Tensor) -> None:
    """The same four pictures, each as often."""
    one = host([{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}}], picture)
    labels = torch.zeros(KEYS, dtype=torch.int64)
    split = Split(images=picture.expand(KEYS, -1, -1, -1), labels=labels)
    augment = Augment(AugmentConfig(hflip=True, vflip=True), split)
    other = augment(gather_batch(split, torch.arange(KEYS), epoch=0, micro_batch=0)).images
    kinds = [picture, picture.flip(2), picture.flip(1), picture.flip(1, 2)]
    for pictures in (one, other):
        shares = [float((pictures == kind).flatten(1).all(1).double().mean()) for kind in kinds]
        assert sum(shares) == pytest.approx(1)
        assert shares == pytest.approx([0.25] * 4, abs=5 * math.sqrt(0.25 * 0.75 / KEYS))


# ----------------------------------------------------------------------------- what is drawn


def test_color_jitter_draws_the_same_factors() -> None:
    reach = {"brightness": 0.4, "contrast": 0.8, "saturation": 0.2}
    ranges = {name: (1 - one, 1 + one) for name, one in reach.items()}
    theirs = parameters("ColorJitter", **ranges, hue=(-0.1, 0.1))
    ours = columns(ColorJitter(**reach, hue=0.1))
    for name, column in zip((*reach, "hue"), ours.unbind(1), strict=True):
        assert_same_draws([drawn[name] for drawn in theirs], column)


def test_affine_draws_the_same_turns_and_scales() -> None:
    theirs = parameters("Affine", rotate=(-20, 20), scale=(0.5, 2.0), keep_ratio=True)
    back = columns(Affine(degrees=20, scale=(0.5, 2.0)))
    assert_same_draws(
        [drawn["rotate"] for drawn in theirs], -back[:, 1].atan2(back[:, 0]).rad2deg()
    )
    assert_same_draws([drawn["scale"]["x"] for drawn in theirs], 1 / back[:, :2].norm(dim=1))


def test_erasing_draws_the_same_squares(picture: Tensor) -> None:
    """Squares, as its ratio of other boxes is uniform and not its logarithm."""
    arguments: dict[str, Any] = {"scale": (0.02, 0.4), "ratio": (1.0, 1.0)}
    holes = np.stack([drawn["holes"][0] for drawn in parameters("Erasing", **arguments)])
    erasing = Erasing(area=(0.02, 0.4), ratio=(1.0, 1.0))
    top, bottom, left, right, _ = columns(erasing).unbind(1)
    for theirs, ours in zip(holes.T, (left, top, right, bottom), strict=True):
        assert_same_draws(theirs, ours)
    one = alone("Erasing", picture, **arguments, fill="random")
    assert_alike(one, device(erasing, picture), rounding=0)


def test_rand_augment(picture: Tensor) -> None:
    """One operation of magnitude 25, where each is one of albumentations', shears by whole pixels too.

    But for sharpness, another filter there, and equalize, which counts a level itself among those below it.
    """
    keys, change = 5_000, RandAugment(num_ops=1, magnitude=25)
    turn, shear, shift = 25.0, math.degrees(math.atan(0.25)), 12

    def both(name: str, of: Any) -> list[dict[str, Any]]:
        return [{name: {**of(sign), "p": 0.5}} for sign in (1, -1)]

    def jitter(knob: str) -> list[dict[str, Any]]:
        neutral = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
        return both("ColorJitter", lambda sign: neutral | {knob: (1 + 0.75 * sign,) * 2})

    def warp(of: Any) -> list[dict[str, Any]]:
        return both("Affine", lambda sign: BLACK | {"interpolation": 0} | of(sign))

    members = [
        {"NoOp": {"p": 1.0}},
        *warp(lambda sign: {"rotate": (turn * sign,) * 2}),
        {"Posterize": {"num_bits": 5, "p": 1.0}},
        {"Solarize": {"threshold_range": (42.5 / 255,) * 2, "p": 1.0}},
        {"AutoContrast": {"method": "pil", "p": 1.0}},
    ]
    for knob in ("brightness", "contrast", "saturation"):
        members += jitter(knob)
    for axis in ("x", "y"):
        still = {"x": 0, "y": 0}
        members += warp(lambda sign, at=axis, of=still: {"translate_px": of | {at: shift * sign}})
        members += warp(
            lambda sign, at=axis, of=still: {
                "shear": {
                    name: (angle, angle) for name, angle in (of | {at: shear * sign}).items()
                },
                "translate_px": of | {at: -4 * sign},
            }
        )
    one = host([{"OneOf": {"transforms": members, "p": 1.0}}], picture, keys)
    drawn = columns(change, 2 * keys)
    is_other = drawn[:, 0, 6] == BLEND_OPS.index("sharpness")
    is_other |= drawn[:, 0, 8] == LUT_OPS.index("equalize")
    drawn = drawn[~is_other][:keys]
    assert_alike(one, change(picture.expand(keys, -1, -1, -1), drawn), rounding=2)
