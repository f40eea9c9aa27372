"""Corrupt test images like CIFAR-100-C (Hendrycks and Dietterich 2019, arXiv 1903.12261).

Each function has the definition and the parameters of the published files, which were made by
make_cifar_c.py of github.com/hendrycks/robustness: it takes one image, uint8 [32, 32, 3], the
parameters of a severity and a generator, and returns uint8 [32, 32, 3]. Values are truncated to
integers, not rounded, as in the published files. `frost` is absent, since it blends in photographs
of frost that this package does not have.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cifar_dist.data.dataset import Split
from cifar_dist.utils.random import generator

SIDE = 32
SEVERITIES = (1, 2, 3, 4, 5)
PUBLISHED_KINDS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)


def _uniform(random: torch.Generator, low: float, high: float, *shape: int) -> np.ndarray:
    unit = torch.rand(shape, generator=random, dtype=torch.float64).numpy()
    return low + (high - low) * unit


def _normal(random: torch.Generator, mean: float, std: float, *shape: int) -> np.ndarray:
    return mean + std * torch.randn(shape, generator=random, dtype=torch.float64).numpy()


def _to_uint8(unit: np.ndarray) -> np.ndarray:
    return (np.clip(unit, 0, 1) * 255).astype(np.uint8)


# ----------------------------------------------------------------------------- noise


def gaussian_noise(image: np.ndarray, std: float, random: torch.Generator) -> np.ndarray:
    return _to_uint8(image / 255 + _normal(random, 0, std, *image.shape))


def shot_noise(image: np.ndarray, photons: float, random: torch.Generator) -> np.ndarray:
    """Replace each value by a Poisson count; white has `photons` on average."""
    expected = torch.from_numpy(image / 255 * photons)
    return _to_uint8(torch.poisson(expected, generator=random).numpy() / photons)


def impulse_noise(image: np.ndarray, share: float, random: torch.Generator) -> np.ndarray:
    """Set a share of the values, each channel independently, to 0 or 255."""
    is_hit = _uniform(random, 0, 1, *image.shape) < share
    is_salt = _uniform(random, 0, 1, *image.shape) < 0.5
    return np.where(is_hit, np.where(is_salt, 255, 0), image).astype(np.uint8)


# ----------------------------------------------------------------------------- blur


def _gaussian(values: np.ndarray, sigma: float, truncate: float, border: int) -> np.ndarray:
    """Return the Gaussian filter of float64 [H, W] or [H, W, C], cut off at `truncate` sigmas."""
    if sigma == 0:
        return values
    width = 2 * int(truncate * sigma + 0.5) + 1
    return cv2.GaussianBlur(values, (width, width), sigma, borderType=border)


def _motion(image: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """Blur uint8 [32, 32] or [32, 32, C] along `angle` (degrees), like ImageMagick's MotionBlurImage.

    The kernel is half a Gaussian of 2 `radius` + 1 taps at integer offsets; edges are repeated.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    pixels = np.arange(SIDE)
    x, y = (
        np.clip(pixels + np.ceil(steps[:, None] * part - 0.5).astype(int), 0, SIDE - 1)
        for part in (math.cos(math.radians(angle)), math.sin(math.radians(angle)))
    )
    shifted = image[y[:, :, None], x[:, None, :]]  # [taps, 32, 32, ...]
    blurred = np.einsum("t,t...->...", weights, shifted)
    return (blurred + 0.5).astype(np.uint8)


@lru_cache
def _zoom_grid(factors: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lower and upper pixel [F, 32] and weight of the upper one, for `_clipped_zoom`."""
    lower, upper, weights = [], [], []
    for factor in factors:
        crop = math.ceil(SIDE / factor)
        size = round(crop * factor)
        top, trim = (SIDE - crop) // 2, (size - SIDE) // 2
        positions = (np.arange(SIDE) + trim) * ((crop - 1) / (size - 1))
        low = positions.astype(int)
        lower.append(top + low)
        upper.append(top + np.minimum(low + 1, crop - 1))
        weights.append(positions - low)
    return np.stack(lower), np.stack(upper), np.stack(weights)


def _clipped_zoom(image: np.ndarray, factors: tuple[float, ...]) -> np.ndarray:
    """Enlarge [32, 32, C] around its center by each factor, bilinear: float64 [F, 32, 32, C]."""
    lower, upper, weights = _zoom_grid(factors)
    index, upper_weight = np.arange(len(factors))[:, None], weights[:, :, None, None]
    zoomed = np.broadcast_to(image, (len(factors), *image.shape))
    for _ in ("rows", "columns"):
        zoomed = (
            zoomed[index, lower] * (1 - upper_weight) + zoomed[index, upper] * upper_weight
        ).swapaxes(1, 2)
    return zoomed


@lru_cache
def _disk(radius: float, alias_blur: float) -> np.ndarray:
    """Return an antialiased disk that sums to 1, f32 [17, 17]."""
    squares = np.arange(-8, 9) ** 2
    disk = (squares[:, None] + squares <= radius**2).astype(np.float32)
    return cv2.GaussianBlur(disk / disk.sum(), (3, 3), alias_blur)


def defocus_blur(
    image: np.ndarray, disk: tuple[float, float], random: torch.Generator
) -> np.ndarray:
    return _to_uint8(cv2.filter2D(image / 255, -1, _disk(*disk)))  # the border is mirrored


def glass_blur(
    image: np.ndarray, parameters: tuple[float, int], random: torch.Generator
) -> np.ndarray:
    """Blur, replace each pixel by a random one of its four upper left neighbors, and blur again.

    The published loop was meant to swap two pixels, but it assigns NumPy views and thus only copies.
    It starts at the last pixel, so the neighbor has not been replaced yet.
    """
    sigma, iterations = parameters
    pixels = _to_uint8(_gaussian(image / 255, sigma, 4, cv2.BORDER_REPLICATE))
    inner = np.arange(2, SIDE)
    for _ in range(iterations):
        up, left = torch.randint(0, 2, (2, len(inner), len(inner)), generator=random).numpy()
        pixels[2:, 2:] = pixels[inner[:, None] - up, inner - left]
    return _to_uint8(_gaussian(pixels / 255, sigma, 4, cv2.BORDER_REPLICATE))


def motion_blur(
    image: np.ndarray, kernel: tuple[int, float], random: torch.Generator
) -> np.ndarray:
    return _motion(image, *kernel, angle=float(_uniform(random, -45, 45)))


def zoom_blur(image: np.ndarray, end: float, random: torch.Generator) -> np.ndarray:
    """Average the image and its enlargements by 1, 1.01, ... below `end`, in float32."""
    unit = (image / 255).astype(np.float32)
    factors = tuple(np.arange(1, end, 0.01).tolist())
    total = unit + _clipped_zoom(unit, factors).astype(np.float32).sum(0)
    return _to_uint8(total / (len(factors) + 1))


# ----------------------------------------------------------------------------- weather


def snow(
    image: np.ndarray,
    parameters: tuple[float, float, float, float, int, float, float],
    random: torch.Generator,
) -> np.ndarray:
    """Add flakes, which are noise above a threshold, enlarged and blurred by motion; whiten the rest."""
    mean, std, zoom, threshold, radius, sigma, original = parameters
    unit = (image / 255).astype(np.float32)
    flakes = _clipped_zoom(_normal(random, mean, std, SIDE, SIDE, 1), (zoom,))[0, :, :, 0]
    flakes[flakes < threshold] = 0
    angle = float(_uniform(random, -135, -45))
    flakes = (_motion(_to_uint8(flakes), radius, sigma, angle) / 255)[:, :, None]
    gray = cv2.cvtColor(unit, cv2.COLOR_RGB2GRAY)[:, :, None]
    whitened = original * unit + (1 - original) * np.maximum(unit, gray * 1.5 + 0.5)
    return _to_uint8(whitened + flakes + np.rot90(flakes, 2))


def _plasma(decay: float, random: torch.Generator) -> np.ndarray:
    """Return a periodic plasma fractal in 0 ... 1, f64 [32, 32], by the diamond-square algorithm."""
    height, amplitude = np.zeros((SIDE, SIDE)), 100.0

    def jittered(sums: np.ndarray) -> np.ndarray:
        return sums / 4 + amplitude * _uniform(random, -amplitude, amplitude, *sums.shape)

    step = SIDE
    while step >= 2:
        half = step // 2
        corners = height[::step, ::step]
        right, below = (corners + np.roll(corners, -1, axis) for axis in (1, 0))
        centers = jittered(right + np.roll(right, -1, 0))
        height[half::step, half::step] = centers
        height[::step, half::step] = jittered(right + centers + np.roll(centers, 1, 0))
        height[half::step, ::step] = jittered(below + centers + np.roll(centers, 1, 1))
        step, amplitude = half, amplitude / decay
    height -= height.min()
    return height / height.max()


def fog(image: np.ndarray, parameters: tuple[float, float], random: torch.Generator) -> np.ndarray:
    amount, decay = parameters
    unit = image / 255
    highest = unit.max()
    foggy = unit + amount * _plasma(decay, random)[:, :, None]
    return _to_uint8(foggy * highest / (highest + amount))


def brightness(image: np.ndarray, shift: float, random: torch.Generator) -> np.ndarray:
    """Add `shift` to the value of HSV; hue and saturation stay, so the channels keep their ratios."""
    unit = image / 255
    value = unit.max(2, keepdims=True)
    ratios = np.divide(unit, value, out=np.ones_like(unit), where=value > 0)  # black becomes gray
    return _to_uint8(ratios * np.clip(value + shift, 0, 1))


# ----------------------------------------------------------------------------- digital


def contrast(image: np.ndarray, factor: float, random: torch.Generator) -> np.ndarray:
    """Scale the distance of each channel from its mean."""
    unit = image / 255
    means = unit.mean((0, 1))
    return _to_uint8((unit - means) * factor + means)


def elastic_transform(
    image: np.ndarray, parameters: tuple[float, float, float], random: torch.Generator
) -> np.ndarray:
    """Move three points by up to `affine` pixels, then each pixel by smoothed noise."""
    alpha, sigma, affine = parameters
    unit = (image / 255).astype(np.float32)
    points = np.array([[26, 26], [26, 6], [6, 6]], np.float32)
    moved = points + _uniform(random, -affine, affine, 3, 2).astype(np.float32)
    matrix = cv2.getAffineTransform(points, moved)
    warped = cv2.warpAffine(unit, matrix, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT_101)
    x, y = (
        np.arange(SIDE).reshape(shape)
        + alpha * _gaussian(_uniform(random, -1, 1, SIDE, SIDE), sigma, 3, cv2.BORDER_REFLECT)
        for shape in ((1, SIDE), (SIDE, 1))
    )
    border = 4  # more than the largest `alpha`
    padded = np.pad(warped, ((border, border), (border, border), (0, 0)), "symmetric")
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    right, down = (x - column)[:, :, None], (y - row)[:, :, None]
    column, row = column + border, row + border
    upper = padded[row, column] * (1 - right) + padded[row, column + 1] * right
    lower = padded[row + 1, column] * (1 - right) + padded[row + 1, column + 1] * right
    return _to_uint8((upper * (1 - down) + lower * down).astype(np.float32))


def pixelate(image: np.ndarray, factor: float, random: torch.Generator) -> np.ndarray:
    size = int(SIDE * factor)
    box = Image.Resampling.BOX
    small = Image.fromarray(image).resize((size, size), box)
    return np.asarray(small.resize((SIDE, SIDE), box))


def jpeg_compression(image: np.ndarray, quality: int, random: torch.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


# ----------------------------------------------------------------------------- all

# For each kind its function, and the parameters of severities 1 to 5.
CORRUPTIONS: dict[str, tuple[Callable[[np.ndarray, Any, torch.Generator], np.ndarray], Any]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion_blur": (motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        elastic_transform,
        ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
    ),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
}


def corrupt(images: Tensor, rows: Sequence[int], kind: str, severity: int) -> Tensor:
    """Return corrupted images, uint8 [B, 3, 32, 32] on the CPU.

    `rows` are the images' rows in the test split. The random numbers of an image depend on the kind,
    the severity and its row alone.
    """
    function, parameters = CORRUPTIONS[kind]
    corrupted = [
        function(image, parameters[severity - 1], generator("corruption", kind, severity, row))
        for image, row in zip(images.permute(0, 2, 3, 1).contiguous().numpy(), rows, strict=True)
    ]
    return torch.from_numpy(np.stack(corrupted)).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True, kw_only=True, eq=False)
class CorruptedSplit(Split):
    """A split whose images are corrupted when a batch reads them."""

    kind: str
    severity: int

    def gather(self, rows: Tensor) -> Tensor:
        images = self.images.index_select(0, rows.to(self.images.device)).cpu()
        return corrupt(images, rows.tolist(), self.kind, self.severity).to(self.labels.device)
