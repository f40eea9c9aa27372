"""Crops of padded images, compared with padding, slicing and mirroring in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.data.augment.padded_images import pad_images


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(0))


@pytest.mark.parametrize("padding", [0, 1, 4, 9])
@pytest.mark.parametrize("mirrored", [False, True])
def test_crops_match_pad_slice_and_flip(images: Tensor, padding: int, mirrored: bool) -> None:
    padded_images = pad_images(images, padding=padding, mirrored=mirrored)
    padded = F.pad(images, (padding,) * 4)
    shifts = torch.arange(-padding, padding + 1)
    rows, y, x, flip = torch.cartesian_prod(
        torch.arange(7), shifts, shifts, torch.arange(1 + mirrored)
    ).unbind(1)
    crops = padded_images.crop(padded_images.offsets(rows, y, x, flip.bool()))
    assert crops.dtype == torch.uint8
    for crop, row, top, left, mirror in zip(crops, rows, y, x, flip, strict=True):
        lines, columns = (
            slice(int(shift) + padding, int(shift) + padding + 32) for shift in (top, left)
        )
        expected = padded[row, :, lines, columns]
        assert torch.equal(crop, expected.flip(2) if mirror else expected)


def test_crop_is_a_copy(images: Tensor) -> None:
    padded_images = pad_images(images, padding=2, mirrored=False)
    zero = torch.zeros(1, dtype=torch.int64)
    padded_images.crop(padded_images.offsets(zero, zero, zero, zero.bool())).zero_()
    assert padded_images.data.sum() == images.long().sum()
