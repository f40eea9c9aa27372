"""Transforms on the device give the same distribution of images as albumentations' counterparts.

Each test compares thousands of augmentations of one image: the mean of each level up to five standard
errors and rounding, and the distributions of levels and parameters by Kolmogorov-Smirnov distance.
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
def image() -> Tensor:
    """Return a smooth image, as interpolation methods differ on noise, uint8 [3, 32, 32]."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.manual_seed(0)) * 255
    return F.interpolate(coarse, size=32, mode="bilinear")[0].round().to(torch.uint8)


def on_host(transforms: list[Any], image: Tensor, keys: int = KEYS) -> Tensor:
    """Return images [keys, 3, 32, 32] of an albumentations pipeline."""
    pipeline, pixels = Pipeline(transforms, image_size=32), image.numpy()
    return torch.from_numpy(np.stack([pipeline(pixels, 0, row) for row in range(keys)]))


def one_on_host(name: str, image: Tensor, **arguments: Any) -> Tensor:
    return on_host([{name: {**arguments, "p": 1.0}}], image)


def columns(transform: Transform, keys: int = KEYS) -> Tensor:
    return transform.draw(
        KeyedRandom(purpose="parity", seed=0, view=0, rows=keys), torch.ones(keys).bool(), 32
    )


def on_device(transform: Transform, image: Tensor) -> Tensor:
    return transform(image.expand(KEYS, -1, -1, -1), columns(transform))


def parameters(name: str, **arguments: Any) -> list[dict[str, Any]]:
    """Return the parameters that albumentations draws for one transform, KEYS times."""
    library = load_library()
    transform = getattr(library, name)(**arguments, p=1.0)
    compose = library.Compose([transform], save_applied_params=True, seed=0)
    blank = np.zeros((32, 32, 3), np.uint8)
    return [compose(image=blank)["applied_transforms"][0][1] for _ in range(KEYS)]


def ks_limit(samples: int, distributions: int = 1) -> float:
    """Return the Kolmogorov-Smirnov distance that any of `distributions` exceeds once in 10^6."""
    return math.sqrt(math.log(2e6 * distributions) / samples)


def assert_same_distribution(one: Any, other: Any) -> None:
    """Check the Kolmogorov-Smirnov distance of two samples."""
    one, other = (np.sort(np.asarray(values, dtype=np.float64)) for values in (one, other))
    values = np.concatenate([one, other])
    cdfs = [np.searchsorted(sample, values, "right") / len(sample) for sample in (one, other)]
    assert np.abs(cdfs[0] - cdfs[1]).max() < ks_limit(KEYS)


def level_cdfs(images: Tensor) -> np.ndarray:
    """Return the cumulative distribution of each of an image's values, [3072, 256]."""
    flat = images.flatten(1).numpy()
    counts = np.zeros((flat.shape[1], 256))
    offsets = np.arange(flat.shape[1]) * 256
    for part in np.array_split(flat, -(-len(flat) // 500)):
        counts += np.bincount((part + offsets).ravel(), minlength=counts.size).reshape(counts.shape)
    return counts.cumsum(1) / len(flat)


def assert_same_images(one: Tensor, other: Tensor, *, rounding: float) -> None:
    """Compare means, distributions and standard deviations up to `rounding` levels."""
    bound = ks_limit(len(one), one[0].numel())
    cdfs, shift = [level_cdfs(images) for images in (one, other)], math.ceil(rounding)
    for below, above in (cdfs, cdfs[::-1]):
        assert (below[:, : 256 - shift] - above[:, shift:]).max() < bound
    one, other = one.double(), other.double()
    error = ((one.var(0) + other.var(0)) / len(one)).sqrt()
    excess = (one.mean(0) - other.mean(0)).abs() - 5 * error
    assert float(excess.max()) <= rounding
    deviations = [float(images.std(0).mean()) for images in (one, other)]
    assert deviations[0] == pytest.approx(deviations[1], rel=0.1)


BLACK = {"interpolation": 1, "border_mode": 0, "fill": 0}


def test_affine_rotation_and_scale(image: Tensor) -> None:
    """Shifts differ by design: albumentations truncates them to whole pixels."""
    one = one_on_host("Affine", image, rotate=[-20, 20], scale=[0.8, 1.2], keep_ratio=True, **BLACK)
    transform = Affine(degrees=20, scale=(0.8, 1.2))
    assert_same_images(one, on_device(transform, image), rounding=0.5)


def test_shift_scale_rotate_rotation(image: Tensor) -> None:
    """Scales differ by design: ShiftScaleRotate scales width and height separately."""
    none = {"shift_limit": [0, 0], "scale_limit": [0, 0]}
    one = one_on_host("ShiftScaleRotate", image, rotate_limit=[-45, 45], **none, **BLACK)
    assert_same_images(one, on_device(Affine(degrees=45), image), rounding=0.5)


def test_albumentations_truncates_shifts_to_whole_pixels(image: Tensor) -> None:
    """Its shift by 3.9 pixels equals a shift by 3 pixels on the device."""
    pipeline = Pipeline(
        [{"Affine": {"translate_percent": [3.9 / 32, 3.9 / 32], "p": 1.0}}], image_size=32
    )
    inverse = torch.tensor([[1.0, 0, -3, 0, 1, -3]])
    shifted = Affine(translate=0.1)(image[None], inverse)[0]
    assert torch.equal(torch.from_numpy(pipeline(image.numpy(), 0, 0).copy()), shifted)


@pytest.mark.parametrize("angle", [-30.0, 90.0])
def test_albumentations_rotates_counterclockwise(image: Tensor, angle: float) -> None:
    """The interpolations differ by about a level."""
    pipeline = Pipeline([{"Affine": {"rotate": [angle, angle], "p": 1.0}}], image_size=32)
    theirs = torch.from_numpy(pipeline(image.numpy(), 0, 0).copy())
    radians = torch.tensor(angle).deg2rad().item()
    cosine, sine = math.cos(radians), -math.sin(radians)
    inverse = torch.tensor([[cosine, sine, 0, -sine, cosine, 0]])
    ours = Affine(degrees=abs(angle))(image[None], inverse)[0]
    assert float((ours.int() - theirs.int()).abs().double().mean()) < 1.0


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_color_jitter(image: Tensor, name: str) -> None:
    """One factor at a time, as albumentations shuffles their order; its hues are even degrees."""
    reach = 0.1 if name == "hue" else 0.4
    center = 0.0 if name == "hue" else 1.0
    arguments: dict[str, Any] = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    arguments[name] = [center - reach, center + reach]
    one = one_on_host("ColorJitter", image, **arguments)
    assert_same_images(one, on_device(ColorJitter(**{name: reach}), image), rounding=2)


def test_coarse_dropout_with_one_hole_matches_erasing(image: Tensor) -> None:
    """Compare how often each pixel is inside an 8 x 8 hole."""
    black = torch.zeros_like(image)  # on which the mean color is visible
    arguments: dict[str, Any] = {
        "num_holes_range": [1, 1],
        "hole_height_range": [0.25, 0.25],
        "hole_width_range": [0.25, 0.25],
        "fill": list(MEAN_COLOR),
    }
    erasing = Erasing(area=(1 / 16, 1 / 16), ratio=(1.0, 1.0), fill="mean")
    one, other = one_on_host("CoarseDropout", black, **arguments), on_device(erasing, black)
    for holes in (one, other):
        assert ((holes != 0).all(1).sum((1, 2)) == 64).all()
    assert_same_images(one, other, rounding=1)


# ----------------------------------------------------------------------------- flips


def test_flips_give_four_images_with_equal_frequency(image: Tensor) -> None:
    one = on_host([{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}}], image)
    labels = torch.zeros(KEYS, dtype=torch.int64)
    split = Split(images=image.expand(KEYS, -1, -1, -1), labels=labels)
    augment = Augment(AugmentConfig(hflip=True, vflip=True), split)
    other = augment(gather_batch(split, torch.arange(KEYS), epoch=0, micro_batch=0)).images
    kinds = [image, image.flip(2), image.flip(1), image.flip(1, 2)]
    for images in (one, other):
        shares = [float((images == kind).flatten(1).all(1).double().mean()) for kind in kinds]
        assert sum(shares) == pytest.approx(1)
        assert shares == pytest.approx([0.25] * 4, abs=5 * math.sqrt(0.25 * 0.75 / KEYS))


# ----------------------------------------------------------------------------- parameters


def test_color_jitter_factors() -> None:
    reach = {"brightness": 0.4, "contrast": 0.8, "saturation": 0.2}
    ranges = {name: (1 - value, 1 + value) for name, value in reach.items()}
    theirs = parameters("ColorJitter", **ranges, hue=(-0.1, 0.1))
    ours = columns(ColorJitter(**reach, hue=0.1))
    for name, column in zip((*reach, "hue"), ours.unbind(1), strict=True):
        assert_same_distribution([params[name] for params in theirs], column)


def test_affine_angles_and_scales() -> None:
    theirs = parameters("Affine", rotate=(-20, 20), scale=(0.5, 2.0), keep_ratio=True)
    inverse = columns(Affine(degrees=20, scale=(0.5, 2.0)))
    angles = -inverse[:, 1].atan2(inverse[:, 0]).rad2deg()
    assert_same_distribution([params["rotate"] for params in theirs], angles)
    scales = 1 / inverse[:, :2].norm(dim=1)
    assert_same_distribution([params["scale"]["x"] for params in theirs], scales)


def test_erasing_of_squares(image: Tensor) -> None:
    """Other boxes differ by design: the ratio is uniform in albumentations, log-uniform here."""
    arguments: dict[str, Any] = {"scale": (0.02, 0.4), "ratio": (1.0, 1.0)}
    holes = np.stack([params["holes"][0] for params in parameters("Erasing", **arguments)])
    erasing = Erasing(area=(0.02, 0.4), ratio=(1.0, 1.0))
    top, bottom, left, right, _ = columns(erasing).unbind(1)
    for theirs, ours in zip(holes.T, (left, top, right, bottom), strict=True):
        assert_same_distribution(theirs, ours)
    one = one_on_host("Erasing", image, **arguments, fill="random")
    assert_same_images(one, on_device(erasing, image), rounding=0)


def test_rand_augment_operations(image: Tensor) -> None:
    """Compare 12 of 14 operations at magnitude 25 with a OneOf of their counterparts.

    Sharpness and equalize differ by design.
    """
    keys, transform = 5_000, RandAugment(num_ops=1, magnitude=25)
    angle, shear, shift = 25.0, math.degrees(math.atan(0.25)), 12

    def both_signs(name: str, arguments: Any) -> list[dict[str, Any]]:
        return [{name: {**arguments(sign), "p": 0.5}} for sign in (1, -1)]

    def jitter(factor: str) -> list[dict[str, Any]]:
        neutral = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
        return both_signs("ColorJitter", lambda sign: neutral | {factor: (1 + 0.75 * sign,) * 2})

    def warp(arguments: Any) -> list[dict[str, Any]]:
        nearest = BLACK | {"interpolation": 0}
        return both_signs("Affine", lambda sign: nearest | arguments(sign))

    members = [
        {"NoOp": {"p": 1.0}},
        *warp(lambda sign: {"rotate": (angle * sign,) * 2}),
        {"Posterize": {"num_bits": 5, "p": 1.0}},
        {"Solarize": {"threshold_range": (42.5 / 255,) * 2, "p": 1.0}},
        {"AutoContrast": {"method": "pil", "p": 1.0}},
    ]
    for factor in ("brightness", "contrast", "saturation"):
        members += jitter(factor)
    zero: dict[str, float] = {"x": 0, "y": 0}
    for axis in ("x", "y"):
        members += warp(lambda sign, axis=axis: {"translate_px": zero | {axis: shift * sign}})
        members += warp(
            lambda sign, axis=axis: {
                "shear": {a: (v, v) for a, v in (zero | {axis: shear * sign}).items()},
                "translate_px": zero | {axis: -4 * sign},
            }
        )
    one = on_host([{"OneOf": {"transforms": members, "p": 1.0}}], image, keys)
    params = columns(transform, 2 * keys)
    excluded = params[:, 0, 6] == BLEND_OPS.index("sharpness")
    excluded |= params[:, 0, 8] == LUT_OPS.index("equalize")
    params = params[~excluded][:keys]
    assert_same_images(one, transform(image.expand(keys, -1, -1, -1), params), rounding=2)
