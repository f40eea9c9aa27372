"""Corruptions against independent implementations of the published definitions; published files."""

from __future__ import annotations

import colorsys
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from cifar_dist.data import corruptions
from cifar_dist.data.corruptions import CORRUPTIONS, PUBLISHED_KINDS, SEVERITIES, corrupt
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.data.ingest.cifar_c import published_splits
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.random import generator


@pytest.fixture(scope="module")
def images(data: Path) -> torch.Tensor:
    """Twelve synthetic images, a noisy one, a black one and a white one."""
    test = load_split(data, "test").images[:12].clone()
    noise = torch.randint(256, (1, 3, 32, 32), generator=generator("test")).byte()
    flat = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 32, 32)
    return torch.cat([test, noise, flat])


def channels_last(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def unit_to_uint8(unit: np.ndarray) -> np.ndarray:
    return (np.clip(unit, 0, 1) * 255).astype(np.uint8)


def gray(value: int, count: int = 20) -> torch.Tensor:
    return torch.full((count, 3, 32, 32), value, dtype=torch.uint8)


def corrupted(images: torch.Tensor, kind: str, severity: int) -> np.ndarray:
    return channels_last(corrupt(images, range(len(images)), kind, severity))


# ----------------------------------------------------------------------------- deterministic kinds


def brightness(image: np.ndarray, severity: int) -> np.ndarray:
    shift = [0.05, 0.1, 0.15, 0.2, 0.3][severity - 1]
    pixels = []
    for red, green, blue in image.reshape(-1, 3) / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        pixels.append(colorsys.hsv_to_rgb(hue, saturation, min(1, value + shift)))
    return 255 * np.array(pixels).reshape(32, 32, 3)


def contrast(image: np.ndarray, severity: int) -> np.ndarray:
    factor = [0.75, 0.5, 0.4, 0.3, 0.15][severity - 1]
    mean = image.reshape(-1, 3).mean(0) / 255
    return 255 * (mean + factor * (image / 255 - mean))


def defocus_blur(image: np.ndarray, severity: int) -> np.ndarray:
    radius, sigma = [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)][severity - 1]
    y, x = np.mgrid[-8:9, -8:9]
    disk = np.where(np.hypot(x, y) <= radius, 1.0, 0.0)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), sigma, radius=1)
    return ndimage.correlate(image.astype(float), kernel[:, :, None], mode="mirror")


def zoom_blur(image: np.ndarray, severity: int) -> np.ndarray:
    # The rounding of `arange` matters: 26 x 1.25 is rounded down, 26 x 1.2500000000000002 up.
    factors = np.arange(1, [1.06, 1.11, 1.16, 1.21, 1.26][severity - 1], 0.01)
    assert len(factors) == [7, 12, 16, 21, 26][severity - 1]
    total = image.astype(float)
    for factor in factors:
        crop = int(np.ceil(32 / factor))
        top = (32 - crop) // 2
        part = image[top : top + crop, top : top + crop]
        zoomed = ndimage.zoom(part.astype(float), (factor, factor, 1), order=1)
        trim = (len(zoomed) - 32) // 2
        total += zoomed[trim : trim + 32, trim : trim + 32]
    return total / (len(factors) + 1)


def pixelate(image: np.ndarray, severity: int) -> np.ndarray:
    size = [30, 28, 27, 24, 20][severity - 1]
    small = Image.fromarray(image).resize((size, size), Image.Resampling.BOX)
    return np.array(small.resize((32, 32), Image.Resampling.BOX))


def jpeg_compression(image: np.ndarray, severity: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="jpeg", quality=[80, 65, 58, 50, 40][severity - 1])
    return np.array(Image.open(file))


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(
    "oracle", [brightness, contrast, defocus_blur, zoom_blur, pixelate, jpeg_compression]
)
def test_deterministic_kinds_match_the_definition(
    images: torch.Tensor, oracle: Any, severity: int
) -> None:
    """Values are truncated, so one that is exact up to rounding may become the integer below."""
    exact = np.stack([oracle(image, severity) for image in channels_last(images)])
    lost = exact - corrupted(images, oracle.__name__, severity)
    assert lost.min() > -1e-3
    assert lost.max() < 1 + 1e-3


# ----------------------------------------------------------------------------- random kinds


def test_noise_has_the_published_moments() -> None:
    for severity in SEVERITIES:
        index = severity - 1
        values = corrupted(gray(128), "gaussian_noise", severity) + 0.5  # truncated
        assert values.mean() == pytest.approx(128, abs=0.6)
        assert values.std() == pytest.approx(255 * [0.04, 0.06, 0.08, 0.09, 0.10][index], rel=0.02)
        values = corrupted(gray(128), "shot_noise", severity) + 0.5
        photons = [500, 250, 100, 75, 50][index]
        assert values.mean() == pytest.approx(128, abs=0.6)
        assert values.std() == pytest.approx(255 * (128 / 255 / photons) ** 0.5, rel=0.02)
        values = corrupted(gray(100), "impulse_noise", severity)
        share = [0.01, 0.02, 0.03, 0.05, 0.07][index]
        assert set(np.unique(values)) == {0, 100, 255}
        for value in (0, 255):
            assert (values == value).mean() == pytest.approx(share / 2, rel=0.15)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_blur_is_the_published_loop(images: torch.Tensor, severity: int) -> None:
    """The published loop assigns views of the array, so that it copies instead of swapping."""
    sigma, iterations = [(0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)][severity - 1]
    ours = corrupted(images, "glass_blur", severity).astype(int)
    for row, image in enumerate(channels_last(images)):
        blurred = ndimage.gaussian_filter(image / 255, (sigma, sigma, 0), mode="nearest")
        pixels = unit_to_uint8(blurred)
        random = generator("corruption", "glass_blur", severity, row)
        for _ in range(iterations):
            up, left = torch.randint(0, 2, (2, 30, 30), generator=random).numpy()
            for y in range(31, 1, -1):
                for x in range(31, 1, -1):
                    pixels[y, x] = pixels[y - up[y - 2, x - 2], x - left[y - 2, x - 2]]
        expected = ndimage.gaussian_filter(pixels / 255, (sigma, sigma, 0), mode="nearest")
        difference = np.abs(ours[row] - unit_to_uint8(expected))
        assert difference.max() <= 2
        if row < 13:  # without the flat images
            assert (difference > 0).mean() < 0.02


@pytest.mark.parametrize("angle", [-135.0, -90.0, -37.3, 0.0, 12.0, 45.0])
def test_motion_blur_is_a_sum_of_shifted_images(images: torch.Tensor, angle: float) -> None:
    image, radius, sigma = channels_last(images)[12], 9, 2.5
    total, weights = np.zeros((32, 32, 3)), 0.0
    for step in range(2 * radius + 1):
        weight = stats.norm.pdf(step, scale=sigma)
        x, y = (np.ceil(step * part(np.deg2rad(angle)) - 0.5) for part in (np.cos, np.sin))
        shifted = ndimage.shift(image.astype(float), (-y, -x, 0), order=0, mode="nearest")
        total, weights = total + weight * shifted, weights + weight
    assert np.array_equal(
        corruptions._motion(image, radius, sigma, angle), np.floor(total / weights + 0.5)
    )


def test_motion_blur_has_the_published_strengths() -> None:
    """A step edge is blurred by half a Gaussian; at any angle the columns far away do not change."""
    assert CORRUPTIONS["motion_blur"][1] == ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
    edge = gray(0, 200)
    edge[:, :, :, 16:] = 200
    for severity in SEVERITIES:
        blurred = corrupted(edge, "motion_blur", severity)[:, 16, :, 0]
        assert np.all(blurred[:, 16:] == 200)  # the kernel points right
        assert np.all((blurred[:, 15] > 0) & (blurred[:, 15] < 200))
        assert np.all(blurred[:, 0] == 0)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_is_whitening_and_flakes_of_the_published_density(severity: int) -> None:
    mean, std = [(0.1, 0.2), (0.1, 0.2), (0.15, 0.3), (0.25, 0.3), (0.3, 0.3)][severity - 1]
    threshold, whitening = [(0.6, 0.05), (0.5, 0.1), (0.55, 0.1), (0.6, 0.15), (0.65, 0.2)][
        severity - 1
    ]
    values = corrupted(gray(0, 200), "snow", severity) / 255
    base = int(255 * whitening / 2) / 255
    assert values.min() == base
    if severity <= 2:  # flakes are not enlarged, so their values are normal
        z = (threshold - mean) / std
        flakes = mean * stats.norm.sf(z) + std * stats.norm.pdf(z)
        assert values.mean() - base == pytest.approx(2 * flakes, rel=0.1)
    assert np.array_equal(values, np.rot90(values, 2, axes=(1, 2)))  # of a black image


def plasma(decay: float, random: torch.Generator) -> np.ndarray:
    """Compute each point from its four neighbors, those at the corners of a square first."""
    height, amplitude, half = np.zeros((32, 32)), 100.0, 16
    square, diamond = ((1, 1), (1, -1), (-1, 1), (-1, -1)), ((0, 1), (0, -1), (1, 0), (-1, 0))
    while half:
        size = 16 // half
        for row, column, neighbors in (half, half, square), (0, half, diamond), (half, 0, diamond):
            jitter = torch.rand(size, size, generator=random, dtype=torch.float64).numpy()
            for (i, j), unit in np.ndenumerate(jitter):
                y, x = row + 2 * half * i, column + 2 * half * j
                around = [height[(y + half * a) % 32, (x + half * b) % 32] for a, b in neighbors]
                height[y, x] = np.mean(around) + amplitude**2 * (2 * unit - 1)
        half, amplitude = half // 2, amplitude / decay
    return (height - height.min()) / (height.max() - height.min())


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_adds_a_plasma_fractal(images: torch.Tensor, severity: int) -> None:
    amount, decay = [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)][severity - 1]
    ours = corrupted(images, "fog", severity).astype(int)
    for row in (3, 12, 13, 14):
        unit = channels_last(images)[row] / 255
        added = amount * plasma(decay, generator("corruption", "fog", severity, row))
        expected = (unit + added[:, :, None]) * unit.max() / (unit.max() + amount)
        assert np.abs(ours[row] - unit_to_uint8(expected)).max() <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_elastic_transform_is_an_affine_map_and_smoothed_noise(
    images: torch.Tensor, severity: int
) -> None:
    alpha, sigma = [(0, 0), (1.6, 6.4), (2.56, 1.92), (3.2, 1.28), (3.2, 0.96)][severity - 1]
    affine = [2.56, 2.24, 1.92, 1.6, 0.96][severity - 1]
    row, image = 3, channels_last(images)[3]
    ours = corrupted(images, "elastic_transform", severity)[row].astype(int)
    random = generator("corruption", "elastic_transform", severity, row)

    def uniform(*shape: int) -> np.ndarray:
        return 2 * torch.rand(*shape, generator=random, dtype=torch.float64).numpy() - 1

    points = np.array([[26, 26], [26, 6], [6, 6]])
    moved = points + affine * uniform(3, 2)
    to_source = np.linalg.solve(np.c_[moved, np.ones(3)], points)  # [x y 1] @ [3, 2]
    y, x = np.mgrid[:32, :32]
    dx, dy = (
        alpha * ndimage.gaussian_filter(uniform(32, 32), sigma, mode="reflect", truncate=3)
        for _ in range(2)
    )
    source_x, source_y = np.moveaxis(np.stack([x, y, np.ones_like(x)], -1) @ to_source, -1, 0)
    channels = []
    for channel in np.moveaxis(image / 255, -1, 0):
        warped = ndimage.map_coordinates(channel, [source_y, source_x], order=1, mode="mirror")
        channels.append(ndimage.map_coordinates(warped, [y + dy, x + dx], order=1, mode="reflect"))
    difference = np.abs(ours - unit_to_uint8(np.stack(channels, -1)))
    assert difference.max() <= 8  # OpenCV may round the coordinates of the affine map
    assert difference.mean() < 1


def test_images_depend_on_kind_severity_and_row_alone(images: torch.Tensor) -> None:
    assert set(PUBLISHED_KINDS) - set(CORRUPTIONS) == {"frost"}
    for kind, (_, parameters) in CORRUPTIONS.items():
        assert len(parameters) == 5
        whole = corrupt(images, range(len(images)), kind, 3)
        assert whole.dtype == torch.uint8
        assert whole.shape == images.shape
        order = torch.tensor([4, 1, 12])
        assert torch.equal(whole[order], corrupt(images[order], order.tolist(), kind, 3))
        split = corruptions.CorruptedSplit(
            images=images, labels=torch.zeros(len(images)).long(), kind=kind, severity=3
        )
        assert torch.equal(whole[order], split.gather(order))
        if kind in ("gaussian_noise", "glass_blur", "motion_blur", "snow", "fog"):
            assert not torch.equal(whole[:1], corrupt(images[:1], [1], kind, 3))


# ----------------------------------------------------------------------------- published files


def write_published(folder: Path, test: Split) -> None:
    """Write files in the layout of CIFAR-100-C whose images are the test images times the severity."""
    folder.mkdir()
    plain = channels_last(test.images)
    for kind in PUBLISHED_KINDS:
        np.save(folder / f"{kind}.npy", np.concatenate([plain * np.uint8(s) for s in SEVERITIES]))
    np.save(folder / "labels.npy", np.tile(test.labels.numpy(), 5).astype(np.uint8))


def test_published_files_are_views_by_severity(tmp_path: Path, data: Path) -> None:
    test = load_split(data, "test")
    write_published(tmp_path / "c", test)
    splits = published_splits(tmp_path / "c", test)
    assert list(splits) == [(kind, severity) for kind in PUBLISHED_KINDS for severity in SEVERITIES]
    rows = torch.tensor([3, 22])
    assert torch.equal(splits["fog", 4].gather(rows), test.images[rows] * 4)


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch was_run",)


def test_invalid_published_files_are_refused_without_executing_code(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    test = load_split(data, "test")
    folder = tmp_path / "c"
    write_published(folder, test)
    good = np.load(folder / "fog.npy")

    def refused(message: str, name: str = "fog.npy") -> None:
        with pytest.raises(UserError, match=message):
            published_splits(folder, test)
        np.save(folder / "fog.npy", good)
        np.save(folder / "labels.npy", np.tile(test.labels.numpy(), 5))

    (folder / "fog.npy").unlink()
    refused(r"fog\.npy: cannot be read \(No such file or directory\); give the folder of CIFAR-100")
    np.save(folder / "fog.npy", good[:-1])
    refused(r"has uint8 \[114, 32, 32, 3\] instead of uint8 \[115, 32, 32, 3\]")
    np.save(folder / "fog.npy", good.astype(np.float32))
    refused("has float32")
    np.save(folder / "fog.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    refused("cannot be read")
    for harm in (b"", b"not an array", (folder / "fog.npy").read_bytes()[:-100]):
        (folder / "fog.npy").write_bytes(harm)
        refused(r"fog\.npy: cannot be read")
    with (folder / "fog.npy").open("wb") as file:
        np.savez(file, fog=good)
    refused("cannot be read")
    np.save(folder / "labels.npy", np.zeros(115, np.uint8))
    refused("its labels are not those of the test split")
    np.save(folder / "labels.npy", np.zeros(115))
    refused(r"has float64 \[115\] instead of an integer type \[115\]")
    assert not (tmp_path / "was_run").exists()
    published_splits(folder, test)
