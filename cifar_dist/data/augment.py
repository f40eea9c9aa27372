"""Batch -> View: a sample's picture is a row in a table.

For each view (the epoch, or epoch % views) every rank draws the same parameters for all N rows.
What a sample looks like depends on (augment.seed, view, row), never on batch, rank or world size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cifar_dist.config import Count, Index, config
from cifar_dist.data.batches import Batch
from cifar_dist.keys import generator

SIDE = 32  # CIFAR's pictures are 32 x 32
MEAN_COLOUR = (129, 124, 112)  # CIFAR-100's mean, rounded: a hole carries no contrast of its own


@config
class AugmentConfig:
    """Crop, flip and cutout on the device; the defaults leave the picture as it is."""

    seed: Index = 0
    views: Count | None = None  # how many different views there are; None: a new one each epoch
    crop_padding: Index = 0  # pixels of black border before the random crop (He et al. 2015, 4.2)
    flip: bool = False  # left to right, one picture in two
    cutout: Index = (
        0  # side of one square hole in pixels (DeVries and Taylor 2017, arXiv 1708.04552)
    )

    def view(self, epoch: int) -> int:
        """Which view of the data an epoch shows."""
        return epoch if self.views is None else epoch % self.views


@dataclass(frozen=True, kw_only=True)
class View:
    images: Tensor  # uint8 [B, 3, 32, 32]
    labels: Tensor  # int64 [B]


class AugmentTable(NamedTuple):
    """One view's parameters, a row for each row of the split; int64 and bool [N]."""

    shift_y: Tensor  # -crop_padding ... crop_padding
    shift_x: Tensor
    flip: Tensor
    hole_y: Tensor  # the hole's centre, 0 ... 31; it may stick out at the border
    hole_x: Tensor

    def take(self, rows: Tensor) -> AugmentTable:
        return AugmentTable(*(column.index_select(0, rows) for column in self))


def draw_table(
    config: AugmentConfig, *, view: int, rows: int, device: torch.device
) -> AugmentTable:
    """Draw all columns for all rows on the CPU, each column from a key of its own, then move them."""

    def integers(column: str, low: int, high: int) -> Tensor:
        stream = generator("augment", column, config.seed, view)
        return torch.randint(low, high, (rows,), generator=stream)

    padding = config.crop_padding
    columns = AugmentTable(
        shift_y=integers("shift_y", -padding, padding + 1),
        shift_x=integers("shift_x", -padding, padding + 1),
        flip=integers("flip", 0, 1 + config.flip).bool(),
        hole_y=integers("hole_y", 0, SIDE),
        hole_x=integers("hole_x", 0, SIDE),
    )
    return AugmentTable(*(column.to(device) for column in columns))


def crop_flip(images: Tensor, shift_y: Tensor, shift_x: Tensor, flip: Tensor) -> Tensor:
    """Shift each picture, black outside, then mirror it where `flip`; uint8 [B, 3, 32, 32].

    Equal to padding, cropping at (padding + shift) and flipping, as one gather and one mask.
    """
    along = torch.arange(SIDE, device=images.device)
    y = along + shift_y[:, None]  # [B, 32], the source line of each line
    x = torch.where(flip[:, None], along.flip(0), along) + shift_x[:, None]
    source = y.clamp(0, SIDE - 1)[:, :, None] * SIDE + x.clamp(0, SIDE - 1)[:, None, :]
    inside = (y == y.clamp(0, SIDE - 1))[:, :, None] & (x == x.clamp(0, SIDE - 1))[:, None, :]
    pixels = images.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, 3, -1))
    return pixels.unflatten(2, (SIDE, SIDE)) * inside[:, None]


def cutout(images: Tensor, hole_y: Tensor, hole_x: Tensor, size: int) -> Tensor:
    """Cover a square of `size` pixels around each centre with the mean colour."""
    along = torch.arange(SIDE, device=images.device)

    def covered(centre: Tensor) -> Tensor:  # bool [B, 32]
        start = centre[:, None] - size // 2
        return (along >= start) & (along < start + size)

    hole = (covered(hole_y)[:, :, None] & covered(hole_x)[:, None, :]).to(torch.uint8)[:, None]
    # plain numbers rather than a tensor of the colour, whose copy to the device would wait for it
    colour = torch.cat([hole * level for level in MEAN_COLOUR], dim=1)
    return images * (1 - hole) + colour


class Augment:
    """Turn a batch of training rows into what this epoch shows of them.

    Keeps the table of the current view, as drawing it costs a millisecond and an epoch shares it.
    """

    def __init__(self, config: AugmentConfig, *, rows: int) -> None:
        self.config = config
        self.rows = rows
        self.view = -1
        self.table: AugmentTable | None = None

    def __call__(self, batch: Batch) -> View:
        config, images = self.config, batch.images
        if config.crop_padding or config.flip or config.cutout:
            table = self.table_of(config.view(batch.epoch), images.device).take(batch.rows)
            if config.crop_padding or config.flip:
                images = crop_flip(images, table.shift_y, table.shift_x, table.flip)
            if config.cutout:
                images = cutout(images, table.hole_y, table.hole_x, config.cutout)
        return View(images=images, labels=batch.labels)

    def table_of(self, view: int, device: torch.device) -> AugmentTable:
        if self.table is None or view != self.view:
            self.table = draw_table(self.config, view=view, rows=self.rows, device=device)
            self.view = view
        return self.table
