"""Batch -> View: a sample's picture is a row in a table.

For each view (the epoch, or epoch % views) every rank draws the same parameters for all N rows.
What a sample looks like depends on (augment.seed, view, row), never on batch, rank or world size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy
import torch
from torch import Tensor

from cifar_dist.config import Count, Fraction, Index, NonNegative, config
from cifar_dist.data.arrow import Split
from cifar_dist.data.batches import Batch
from cifar_dist.keys import generator, key

SIDE = 32  # CIFAR's pictures are 32 x 32
MEAN_COLOUR = (129, 124, 112)  # CIFAR-100's mean, rounded: a hole carries no contrast of its own


@config
class AugmentConfig:
    """Crop, flip, cutout and mixing on the device; the defaults leave the picture as it is.

    `views` says how many different views of the data there are: None, a new one each epoch; a number,
    these again and again; `all`, a new one each epoch, drawn from all that crop and flip can make of
    a picture: (2 crop_padding + 1)^2, twice with flip.
    """

    seed: Index = 0
    views: Count | Literal["all"] | None = None
    crop_padding: Index = 0  # pixels of black border before the random crop (He et al. 2015, 4.2)
    flip: bool = False  # left to right, one picture in two
    cutout: Index = (
        0  # side of one square hole in pixels (DeVries and Taylor 2017, arXiv 1708.04552)
    )
    mixup: NonNegative = 0.0  # alpha of Beta(alpha, alpha) (Zhang et al. 2018, arXiv 1710.09412)
    cutmix: NonNegative = 0.0  # the same (Yun et al. 2019, arXiv 1905.04899); both: either by coin
    mix_probability: Fraction = 1.0  # of a picture to be mixed at all

    def __post_init__(self) -> None:
        if self.views == "all" and (self.cutout or self.mixes):
            raise ValueError(
                "views: all can count crops and flips only; remove cutout, mixup and cutmix, or "
                "give a number of views"
            )

    @property
    def mixes(self) -> bool:
        return bool((self.mixup or self.cutmix) and self.mix_probability)

    @property
    def num_views(self) -> int | None:
        """How many different views a picture has; None without an end."""
        if self.views == "all":
            return (2 * self.crop_padding + 1) ** 2 * (1 + self.flip)
        return self.views

    def view(self, epoch: int) -> int:
        """Which view of the data an epoch shows."""
        return epoch % self.views if isinstance(self.views, int) else epoch


@dataclass(frozen=True, kw_only=True)
class View:
    """What an epoch shows of a batch.

    Where partners are mixed in, a loss is share * loss(labels) + (1 - share) * loss(partner_labels).
    """

    images: Tensor  # uint8 [B, 3, 32, 32]
    labels: Tensor  # int64 [B]
    numbers: Tensor  # int64 [B], which of its views each picture is; a row and a number name it
    partner_labels: Tensor | None = None  # int64 [B]
    share: Tensor | None = None  # f32 [B], how much of the picture is the row's own


class AugmentTable(NamedTuple):
    """One view's parameters, a row for each row of the split; int64 and bool [N]."""

    shift_y: Tensor  # -crop_padding ... crop_padding
    shift_x: Tensor
    flip: Tensor
    hole_y: Tensor  # the hole's centre, 0 ... 31; it may stick out at the border
    hole_x: Tensor

    def take(self, rows: Tensor) -> AugmentTable:
        return AugmentTable(*(column.index_select(0, rows) for column in self))


class MixTable(NamedTuple):
    """One view's partners, a row for each row of the split."""

    partner: Tensor  # int64 [N], the row that is mixed in
    share: Tensor  # f32 [N], how much of the picture stays the row's own; 1: nothing is mixed in
    box: Tensor  # int64 [N, 4], where the partner's pixels are pasted: top, bottom, left, right
    pasted: Tensor  # bool [N], pasted into the box (CutMix) rather than blended (MixUp)

    def take(self, rows: Tensor) -> MixTable:
        return MixTable(*(column.index_select(0, rows) for column in self))


def draw_table(
    config: AugmentConfig, view: int, *, rows: int, device: torch.device
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


def numbered_table(
    config: AugmentConfig, number: int, *, rows: int, device: torch.device
) -> AugmentTable:
    """The table in which every row shows its view `number`, 0 ... num_views - 1."""
    table = draw_table(config, number, rows=rows, device=device)
    if config.views != "all":
        return table
    shifts, flip = divmod(number, 1 + config.flip)
    shift_y, shift_x = divmod(shifts, 2 * config.crop_padding + 1)
    return table._replace(
        shift_y=torch.full_like(table.shift_y, shift_y - config.crop_padding),
        shift_x=torch.full_like(table.shift_x, shift_x - config.crop_padding),
        flip=torch.full_like(table.flip, bool(flip)),
    )


def view_numbers(config: AugmentConfig, table: AugmentTable) -> Tensor:
    """Which of all views each row of the table shows, int64; the way back of `numbered_table`."""
    padding = config.crop_padding
    shifts = (table.shift_y + padding) * (2 * padding + 1) + table.shift_x + padding
    return shifts * (1 + config.flip) + table.flip


def draw_mix_table(
    config: AugmentConfig, view: int, *, rows: int, partners: Tensor, device: torch.device
) -> MixTable:
    """Draw each row's partner among `partners` (int64) and how much of it shows.

    A share is drawn from Beta(alpha, alpha). CutMix's box has the area 1 - share around a uniform
    centre; what sticks out is cut off, and the share is that of the pixels which really stay.
    """

    def stream(column: str) -> numpy.random.Generator:
        keyed = numpy.random.Philox(key("augment", column, config.seed, view))
        return numpy.random.Generator(keyed)

    def shares(alpha: float) -> Any:
        return stream("share").beta(alpha, alpha, rows) if alpha else numpy.ones(rows)

    chosen = stream("partner").integers(len(partners), size=rows)
    cutmix_share = float(config.cutmix > 0) / (1 + (config.mixup > 0))
    pasted = stream("pasted").random(rows) < cutmix_share
    share = numpy.where(pasted, shares(config.cutmix), shares(config.mixup))
    share[stream("mix").random(rows) >= config.mix_probability] = 1.0

    half = SIDE * numpy.sqrt(1 - share) / 2
    centres = stream("box").random((2, rows)) * SIDE
    edges = [edge for centre in centres for edge in (centre - half, centre + half)]
    box = numpy.stack(edges, axis=1).round().clip(0, SIDE).astype(numpy.int64)
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    share = numpy.where(pasted, 1 - area / SIDE**2, share)
    columns = MixTable(
        partner=partners.cpu()[torch.from_numpy(chosen)],
        share=torch.from_numpy(share).float(),
        box=torch.from_numpy(box),
        pasted=torch.from_numpy(pasted),
    )
    return MixTable(*(column.to(device) for column in columns))


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


def mix(images: Tensor, others: Tensor, table: MixTable) -> Tensor:
    """Blend each picture with its partner, or paste the partner's box into it; uint8 [B, 3, 32, 32]."""
    along = torch.arange(SIDE, device=images.device)
    top, bottom, left, right = table.box[:, :, None].unbind(1)  # [B, 1] each
    lines, columns = (along >= top) & (along < bottom), (along >= left) & (along < right)
    inside = (lines[:, :, None] & columns[:, None, :])[:, None]  # [B, 1, 32, 32]
    share = table.share[:, None, None, None]
    blended = (share * images + (1 - share) * others).round().to(torch.uint8)
    pasted = torch.where(inside, others, images)
    return torch.where(table.pasted[:, None, None, None], pasted, blended)


class Augment:
    """Turn a batch of training rows into what its epoch shows of them.

    `split` has the pictures of partners, which are chosen among `rows` (int64, CPU), those that are
    trained on, or all. With `number`, 0 ... num_views - 1, it shows that view of each picture instead.
    Keeps the tables of one view, as drawing them costs milliseconds and an epoch shares them.
    """

    def __init__(
        self,
        config: AugmentConfig,
        split: Split,
        rows: Tensor | None = None,
        *,
        number: int | None = None,
    ) -> None:
        self.config, self.split, self.number = config, split, number
        self.rows = torch.arange(len(split.labels)) if rows is None else rows
        self.view = -1
        self.table: AugmentTable | None = None
        self.mix_table: MixTable | None = None

    def __call__(self, batch: Batch) -> View:
        view = self.config.view(batch.epoch) if self.number is None else self.number
        if view != self.view:
            self.view = view
            self.draw(view)
        numbers = torch.full_like(batch.rows, view)
        own = self.table.take(batch.rows) if self.table else None
        if own and self.config.views == "all":
            numbers = view_numbers(self.config, own)
        images = self.change(batch.images, own)
        if self.table is None or self.mix_table is None:
            return View(images=images, labels=batch.labels, numbers=numbers)
        mixing = self.mix_table.take(batch.rows)
        others = self.split.images.index_select(0, mixing.partner)
        others = self.change(others, self.table.take(mixing.partner))
        return View(
            images=mix(images, others, mixing),
            labels=batch.labels,
            numbers=numbers,
            partner_labels=self.split.labels.index_select(0, mixing.partner),
            share=mixing.share,
        )

    def draw(self, view: int) -> None:
        """Draw what the configuration needs for this view."""
        config, size = self.config, len(self.split.labels)
        device = self.split.labels.device
        if config.crop_padding or config.flip or config.cutout or config.mixes:
            draw = draw_table if self.number is None else numbered_table
            self.table = draw(config, view, rows=size, device=device)
        if config.mixes:
            self.mix_table = draw_mix_table(
                config, view, rows=size, partners=self.rows, device=device
            )

    def change(self, images: Tensor, table: AugmentTable | None) -> Tensor:
        """Each picture under its row of the table."""
        config = self.config
        if table and (config.crop_padding or config.flip):
            images = crop_flip(images, table.shift_y, table.shift_x, table.flip)
        if table and config.cutout:
            images = cutout(images, table.hole_y, table.hole_x, config.cutout)
        return images
