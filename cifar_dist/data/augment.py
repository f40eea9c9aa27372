"""Batch -> View: a sample's picture is a row in a table.

For each view (the epoch, or epoch % views) every rank draws the same parameters for all N rows.
What a sample looks like depends on (augment.seed, view, row), never on batch, rank or world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy
import torch
from torch import Tensor

from cifar_dist.config import Count, Fraction, Index, NonNegative, config
from cifar_dist.data.arrow import Split
from cifar_dist.data.batches import Batch
from cifar_dist.data.changes import (
    Affine,
    Change,
    ColorJitter,
    Erasing,
    OneOf,
    named_changes,
)
from cifar_dist.data.host_pictures import HostPictures, Inline
from cifar_dist.data.host_pipeline import check_names
from cifar_dist.data.image_ops import SIDE, crop_flip, cutout, mix
from cifar_dist.data.policies import RandAugment, TrivialAugment
from cifar_dist.keys import Draws, key


@config
class AugmentConfig:
    """What is done to pictures, in this order; the defaults leave them as they are.

    `host` is an albumentations pipeline as data (host_pipeline.py); all below it runs on the device.

    `views` says how many different views of the data there are: None, a new one each epoch; a number,
    these again and again; `all`, a new one each epoch, drawn from all that crop and flip can make of
    a picture: (2 crop_padding + 1)^2, twice with flip.
    """

    seed: Index = 0
    views: Count | Literal["all"] | None = None
    host: tuple[dict[str, dict[str, Any]], ...] | None = None
    host_workers: Index = 2  # a process; 0: the training process makes its own pictures
    crop_padding: Index = 0  # pixels of black border before the random crop (He et al. 2015, 4.2)
    flip: bool = False  # left to right, one picture in two
    vertical_flip: bool = False  # upside down, one picture in two
    affine: Affine | None = None
    color_jitter: ColorJitter | None = None
    rand_augment: RandAugment | None = None
    trivial_augment: TrivialAugment | None = None
    one_of: OneOf | None = None
    erasing: Erasing | None = None
    cutout: Index = (
        0  # side of one square hole in pixels (DeVries and Taylor 2017, arXiv 1708.04552)
    )
    mixup: NonNegative = 0.0  # alpha of Beta(alpha, alpha) (Zhang et al. 2018, arXiv 1710.09412)
    cutmix: NonNegative = 0.0  # the same (Yun et al. 2019, arXiv 1905.04899); both: either by coin
    mix_probability: Fraction = 1.0  # of a picture to be mixed at all
    repeats: Count = 1  # views of each row in a batch (Hoffer et al. 2020, arXiv 1901.09335)

    def __post_init__(self) -> None:
        if self.host is not None:
            check_names(self.host)
            if self.repeats > 1:
                raise ValueError("host makes one view an epoch, repeats wants more: remove one")
        others = ("host", "vertical_flip", "one_of", "cutout", "mixup", "cutmix")
        uncounted = [*named_changes(self), *(name for name in others if vars(self)[name])]
        if self.views == "all" and uncounted:
            raise ValueError(
                f"views: all can count crops and flips only; remove {', '.join(uncounted)}, or "
                "give a number of views"
            )

    @property
    def mixes(self) -> bool:
        return bool((self.mixup or self.cutmix) and self.mix_probability)

    @property
    def changes(self) -> dict[str, Change]:
        """What each picture goes through between crop and cutout, by name and in order."""
        group = named_changes(self.one_of) if self.one_of else {}
        changes = named_changes(self) | {f"one_of.{name}": one for name, one in group.items()}
        return dict(sorted(changes.items(), key=lambda named: named[0] == "erasing"))  # stays last

    @property
    def needs_table(self) -> bool:
        """Whether anything is drawn for a row, or its view is told from its row of the table."""
        moves = self.crop_padding or self.flip or self.vertical_flip or self.views == "all"
        return bool(moves or self.changes or self.cutout or self.mixes)

    @property
    def num_views(self) -> int | None:
        """How many different views a picture has; None without an end."""
        if self.views == "all":
            return (2 * self.crop_padding + 1) ** 2 * (1 + self.flip)
        return self.views

    def shown(self, epoch: int) -> list[int]:
        """Which views of the data an epoch shows: one, or one for each copy of a row."""
        first = epoch * self.repeats
        views = range(first, first + self.repeats)
        return [view % self.views if isinstance(self.views, int) else view for view in views]


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
    vertical_flip: Tensor
    changes: dict[str, Tensor]  # [N, ...] for each of config.changes

    def take(self, rows: Tensor) -> AugmentTable:
        return AugmentTable(
            shift_y=self.shift_y.index_select(0, rows),
            shift_x=self.shift_x.index_select(0, rows),
            flip=self.flip.index_select(0, rows),
            hole_y=self.hole_y.index_select(0, rows),
            hole_x=self.hole_x.index_select(0, rows),
            vertical_flip=self.vertical_flip.index_select(0, rows),
            changes={name: column.index_select(0, rows) for name, column in self.changes.items()},
        )


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
    draws = Draws(what="augment", seed=config.seed, view=view, rows=rows)
    padding = config.crop_padding
    return AugmentTable(
        shift_y=draws.integers("shift_y", -padding, padding + 1).to(device),
        shift_x=draws.integers("shift_x", -padding, padding + 1).to(device),
        flip=draws.integers("flip", 0, 1 + config.flip).bool().to(device),
        hole_y=draws.integers("hole_y", 0, SIDE).to(device),
        hole_x=draws.integers("hole_x", 0, SIDE).to(device),
        vertical_flip=draws.integers("vertical_flip", 0, 1 + config.vertical_flip)
        .bool()
        .to(device),
        changes={name: column.to(device) for name, column in draw_changes(config, draws).items()},
    )


def draw_changes(config: AugmentConfig, draws: Draws) -> dict[str, Tensor]:
    """The column of each change, by name."""
    columns = {}
    for name, change in named_changes(config).items():
        own = draws.of(name)
        columns[name] = change.draw(own, own.uniform("applied", 0, 1) < change.probability)
    group = config.one_of.draw(draws.of("one_of")) if config.one_of else {}
    return columns | {f"one_of.{name}": column for name, column in group.items()}


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


def stacked(tables: Sequence[AugmentTable]) -> AugmentTable:
    """The tables of N rows each below one another: row r of table c becomes row c * N + r."""
    names = [name for name in AugmentTable._fields if name != "changes"]
    parts = [table._asdict() for table in tables]
    return AugmentTable(
        **{name: torch.cat([part[name] for part in parts]) for name in names},
        changes={
            name: torch.cat([table.changes[name] for table in tables]) for name in tables[0].changes
        },
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


class Augment:
    """Turn a batch of training rows into what its epoch shows of them.

    `split` has the pictures of partners, which are chosen among `rows` (int64, CPU), those that are
    trained on, or all. With `number`, 0 ... num_views - 1, it shows that view of each picture instead.
    Keeps the tables of one epoch, as drawing them costs milliseconds. Without a `host`
    that has the configured pipeline's pictures ready it makes them itself.
    """

    def __init__(
        self,
        config: AugmentConfig,
        split: Split,
        rows: Tensor | None = None,
        *,
        number: int | None = None,
        host: HostPictures | None = None,
    ) -> None:
        self.config, self.split, self.number, self.host = config, split, number, host
        if config.host is not None and host is None:
            self.host = Inline(config.host, split, seed=config.seed)
        self.rows = torch.arange(len(split.labels)) if rows is None else rows
        self.views: list[int] = []  # whose tables lie here, N rows for each copy
        self.numbers = torch.empty(0, dtype=torch.int64)
        self.table: AugmentTable | None = None
        self.mix_table: MixTable | None = None

    def __call__(self, batch: Batch) -> View:
        views = self.config.shown(batch.epoch) if self.number is None else [self.number]
        if views != self.views:
            self.views = views
            self.draw(views)
        if batch.copies is None:
            numbers, above = torch.full_like(batch.rows, views[0]), None
        else:
            numbers = self.numbers.index_select(0, batch.copies)
            above = batch.copies * len(self.split.labels)  # rows of other copies in the tables
        own = self.table.take(below(batch.rows, above)) if self.table else None
        if own and self.config.views == "all":
            numbers = view_numbers(self.config, own)
        images = self.host(views[0], batch.rows) if self.host else batch.images
        images = self.change(images, own)
        if self.table is None or self.mix_table is None:
            return View(images=images, labels=batch.labels, numbers=numbers)
        mixing = self.mix_table.take(below(batch.rows, above))
        others = (
            self.host(views[0], mixing.partner)
            if self.host
            else self.split.images.index_select(0, mixing.partner)
        )
        others = self.change(others, self.table.take(below(mixing.partner, above)))
        return View(
            images=mix(images, others, mixing.share, mixing.box, mixing.pasted),
            labels=batch.labels,
            numbers=numbers,
            partner_labels=self.split.labels.index_select(0, mixing.partner),
            share=mixing.share,
        )

    def draw(self, views: list[int]) -> None:
        """Draw what the configuration needs for these views, one for each copy of a row."""
        config, size = self.config, len(self.split.labels)
        device = self.split.labels.device
        self.numbers = torch.tensor(views, device=device)
        if config.needs_table:
            draw = draw_table if self.number is None else numbered_table
            self.table = stacked([draw(config, view, rows=size, device=device) for view in views])
        if config.mixes:
            mixes = [
                draw_mix_table(config, view, rows=size, partners=self.rows, device=device)
                for view in views
            ]
            self.mix_table = MixTable(*(torch.cat(columns) for columns in zip(*mixes, strict=True)))

    def change(self, images: Tensor, table: AugmentTable | None) -> Tensor:
        """Each picture under its row of the table."""
        config = self.config
        if table is None:
            return images
        if config.crop_padding or config.flip or config.vertical_flip:
            upside_down = table.vertical_flip if config.vertical_flip else None
            images = crop_flip(images, table.shift_y, table.shift_x, table.flip, upside_down)
        for name, change in config.changes.items():
            images = change(images, table.changes[name])
        if config.cutout:
            images = cutout(images, table.hole_y, table.hole_x, config.cutout)
        return images


def below(rows: Tensor, above: Tensor | None) -> Tensor:
    """Where rows of a copy stand in stacked tables."""
    return rows if above is None else rows + above
