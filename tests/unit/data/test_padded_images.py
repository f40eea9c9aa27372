"""A crop as one run of bytes is a crop: against padding, slicing and mirroring by torch."""

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
def test_every_crop_equals_pad_slice_and_mirror(
    images: Tensor, padding: int, mirrored: bool
) -> None:
    canvas = pad_images(images, padding=padding, mirrored=mirrored)
    padded = F.pad(images, (padding,) * 4)
    shifts = torch.arange(-padding, padding + 1)
    pictures, y, x, flip = torch.cartesian_prod(
        torch.arange(7), shifts, shifts, torch.arange(1 + mirrored)
    ).unbind(1)
    cut = canvas.crop(canvas.offsets(pictures, y, x, flip.bool()))
    assert cut.dtype == torch.uint8
    for found, picture, top, left, mirror in zip(cut, pictures, y, x, flip, strict=True):
        lines, columns = (
            slice(int(shift) + padding, int(shift) + padding + 32) for shift in (top, left)
        )
        expected = padded[picture, :, lines, columns]
        assert torch.equal(found, expected.flip(2) if mirror else expected)


def test_a_cut_is_a_copy(images: Tensor) -> None:
    canvas = pad_images(images, padding=2, mirrored=False)
    still = torch.zeros(1, dtype=torch.int64)
    cut = canvas.crop(canvas.offsets(still, still, still, still.bool()))
    cut.zero_()
    assert canvas.data.sum() == images.long().sum()
