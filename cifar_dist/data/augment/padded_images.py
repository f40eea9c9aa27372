"""Padded images in a layout in which every crop is a view of one contiguous run of bytes.

A crop starts at some offset in its padded image and skips the same number of bytes after each line.
Mirrored copies are stored as well, so cropping and flipping a batch is a single gather of runs; on
the CPU each is one `memcpy`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddedImages:
    """Images with a black border; `data` is uint8 [1 or 2 (mirrored), N, 3, side, side]."""

    data: Tensor
    padding: int

    @property
    def side(self) -> int:
        """Return the size of the padded images in pixels."""
        return self.data.shape[-1]

    def offsets(self, rows: Tensor, shift_y: Tensor, shift_x: Tensor, flip: Tensor) -> Tensor:
        """Return the offsets of crops of these images; see `crop_offsets`."""
        num_images = self.data.shape[1]
        return crop_offsets(
            rows,
            shift_y,
            shift_x,
            flip,
            num_images=num_images,
            image_size=self.side - 2 * self.padding,
            padding=self.padding,
        )

    def crop(self, offsets: Tensor) -> Tensor:
        """Return the crops at `offsets` (int64 [B]), uint8 [B, 3, S, S], not contiguous."""
        side, channel = self.side, self.side**2
        size = side - 2 * self.padding
        length = 2 * channel + (size - 1) * side + size
        runs = self.data.as_strided((self.data.numel() - length + 1, length), (1, 1))
        return runs.index_select(0, offsets).as_strided(
            (len(offsets), 3, size, size), (length, channel, side, 1)
        )


def crop_offsets(
    rows: Tensor,
    shift_y: Tensor,
    shift_x: Tensor,
    flip: Tensor,
    *,
    num_images: int,
    image_size: int,
    padding: int,
) -> Tensor:
    """Return where crops start in the data of `num_images` padded images, int64 [B].

    The result is that of cropping, then mirroring. All arguments are int64 [B] except `flip`, bool.
    Shifts range over -padding ... padding, down and to the right.
    """
    side = image_size + 2 * padding
    line = shift_y + padding
    column = torch.where(flip, -shift_x, shift_x) + padding
    return ((flip * num_images + rows) * 3 * side + line) * side + column


def padded_bytes(num_images: int, *, image_size: int, padding: int, mirrored: bool) -> int:
    """Return the size of the padded images in bytes."""
    return (1 + mirrored) * num_images * 3 * (image_size + 2 * padding) ** 2


def pad_images(images: Tensor, *, padding: int, mirrored: bool) -> PaddedImages:
    """Copy uint8 [N, 3, S, S] images to padded ones, (1 + mirrored) (1 + 2 padding / S)^2 the size."""
    size = images.shape[-1]
    side = size + 2 * padding
    data = images.new_zeros(1 + mirrored, len(images), 3, side, side)
    sources = (images, images.flip(3)) if mirrored else (images,)
    for target, source in zip(data, sources, strict=True):
        target[:, :, padding : padding + size, padding : padding + size] = source
    return PaddedImages(data, padding)
