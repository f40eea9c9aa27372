"""Floor 1. Pictures with a border, laid out so that any crop of one is a single run of bytes.

A crop begins somewhere in its bordered picture and leaves out the same bytes behind each line, so it
is a view of one contiguous piece; that of the mirrored picture stands beside. To crop and flip a
batch is then one gather of as many pieces, on a CPU a `memcpy` each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cifar_dist.data.augment.image_ops import SIDE


@dataclass(frozen=True)
class PaddedImages:
    """`data` is uint8 [1 or 2 (mirrored), N, 3, side, side]: black, but for the picture in the middle."""

    data: Tensor
    padding: int

    @property
    def side(self) -> int:
        return SIDE + 2 * self.padding

    def offsets(self, pictures: Tensor, shift_y: Tensor, shift_x: Tensor, flip: Tensor) -> Tensor:
        """Return where crops of this canvas begin."""
        images = self.data.shape[1]
        return crop_offsets(pictures, shift_y, shift_x, flip, images=images, padding=self.padding)

    def crop(self, places: Tensor) -> Tensor:
        """uint8 [B, 3, 32, 32] from int64 [B]; strided, as the ends of lines lie between."""
        side, channel = self.side, self.side**2
        reach = 2 * channel + (SIDE - 1) * side + SIDE
        runs = self.data.as_strided((self.data.numel() - reach + 1, reach), (1, 1))
        return runs.index_select(0, places).as_strided(
            (len(places), 3, SIDE, SIDE), (reach, channel, side, 1)
        )


def crop_offsets(
    rows: Tensor, shift_y: Tensor, shift_x: Tensor, flip: Tensor, *, images: int, padding: int
) -> Tensor:
    """Return where crops begin on a canvas of so many images: equal to crop, then mirror.

    int64 [B] like all arguments but `flip`, bool. Shifts are -padding ... padding, down and right;
    what is outside of an image is black.
    """
    side = SIDE + 2 * padding
    line = shift_y + padding
    column = torch.where(flip, -shift_x, shift_x) + padding
    return ((flip * images + rows) * 3 * side + line) * side + column


def padded_bytes(pictures: int, *, padding: int, mirrored: bool) -> int:
    """What a canvas of so many pictures takes."""
    return (1 + mirrored) * pictures * 3 * (SIDE + 2 * padding) ** 2


def pad_images(images: Tensor, *, padding: int, mirrored: bool) -> PaddedImages:
    """uint8 [N, 3, 32, 32] on a canvas: a copy of (1 + mirrored) (1 + padding / 16)^2 the size."""
    side = SIDE + 2 * padding
    data = images.new_zeros(1 + mirrored, len(images), 3, side, side)
    for copy, shown in zip(data, (images, images.flip(3)) if mirrored else (images,), strict=True):
        copy[:, :, padding : padding + SIDE, padding : padding + SIDE] = shown
    return PaddedImages(data, padding)
