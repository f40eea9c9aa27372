"""Batch -> View: a sample's picture is a row in a table.

For each view (the epoch, or epoch % views) every rank draws the same parameters for all N rows.
What a sample looks like depends on (augment.seed, view, row), never on batch, rank or world size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

import numpy
import torch
from annotated_types import Interval
from torch import Tensor

from cifar_dist.config import Count, Fraction, Index, NonNegative, config
from cifar_dist.data.arrow import Split
from cifar_dist.data.batches import Batch, send
from cifar_dist.data.canvas import Canvas, canvas_of
from cifar_dist.data.changes import Affine, Change, ColorJitter, Erasing, OneOf, named_changes
from cifar_dist.data.host_pictures import HostPictures, Inline
from cifar_dist.data.host_pipeline import check_names
from cifar_dist.data.image_ops import SIDE, cutout, each, mix
from cifar_dist.data.policies import RandAugment, TrivialAugment
from cifar_dist.keys import Draws, key

Padding = Annotated[int, Interval(ge=0, lt=SIDE)]  # with more, a crop could miss the picture
Hole = Annotated[int, Interval(ge=0, le=2 * SIDE)]  # its middle lies in the picture


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
    crop_padding: Padding = 0  # pixels of black border before the random crop (He et al. 2015, 4.2)
    # left to right, one picture in two; `alternate`: by lot at first, then every other epoch, so that two
    # epochs in a row show both sides of each picture (Jordan 2024, arXiv 2404.00498, section 3.6)
    flip: bool | Literal["alternate"] = False
    vertical_flip: bool = False  # upside down, one picture in two
    affine: Affine | None = None
    color_jitter: ColorJitter | None = None
    rand_augment: RandAugment | None = None
    trivial_augment: TrivialAugment | None = None
    one_of: OneOf | None = None
    erasing: Erasing | None = None
    cutout: Hole = (
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
        if isinstance(self.views, int) and self.views % 2 and self.flip == "alternate":
            raise ValueError(
                f"flip: alternate shows both sides in two views, and views={self.views} is odd: add one"
            )
        if self.views == "all" and self.flip == "alternate":
            raise ValueError("views: all draws flips of its own: write flip: true")
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
    def moves(self) -> bool:
        """Whether pictures are cropped or mirrored left to right."""
        return bool(self.crop_padding or self.flip)

    @property
    def num_views(self) -> int | None:
        """How many different views a picture has; None without an end."""
        if self.views == "all":
            return (2 * self.crop_padding + 1) ** 2 * (1 + bool(self.flip))
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

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in vars(self).values() if tensor is not None]

    def __getitem__(self, samples: slice) -> View:
        """Return some of the samples, in the same memory."""
        columns = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return View(**{name: tensor[samples] for name, tensor in columns.items()})


class AugmentTable(NamedTuple):
    """One view's parameters, a row for each row of the split; int64 and bool [N]."""

    shift_y: Tensor  # -crop_padding ... crop_padding
    shift_x: Tensor
    flip: Tensor
    hole_y: Tensor  # the hole's centre, 0 ... 31; it may stick out at the border
    hole_x: Tensor
    vertical_flip: Tensor
    changes: dict[str, Tensor]  # [N, ...] for each of config.changes


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
        shift_y=send(draws.integers("shift_y", -padding, padding + 1), device),
        shift_x=send(draws.integers("shift_x", -padding, padding + 1), device),
        flip=send(draw_flips(config, draws), device),
        hole_y=send(draws.integers("hole_y", 0, SIDE), device),
        hole_x=send(draws.integers("hole_x", 0, SIDE), device),
        vertical_flip=send(
            draws.integers("vertical_flip", 0, 1 + config.vertical_flip).bool(), device
        ),
        changes={
            name: send(column, device) for name, column in draw_changes(config, draws).items()
        },
    )


def draw_flips(config: AugmentConfig, draws: Draws) -> Tensor:
    """Which pictures are mirrored, bool [N]."""
    if config.flip == "alternate":
        first = replace(draws, view=0).integers("flip", 0, 2)
        return (first + draws.view) % 2 == 1
    return draws.integers("flip", 0, 1 + config.flip).bool()


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
    shifts, flip = divmod(number, 1 + bool(config.flip))
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
    return shifts * (1 + bool(config.flip)) + table.flip


def draw_mix_table(
    config: AugmentConfig, view: int, *, rows: int, partners: Tensor, device: torch.device | str
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
    return MixTable(*(send(column, torch.device(device)) for column in columns))


def draw_mix_tables(
    config: AugmentConfig,
    views: list[int],
    *,
    rows: int,
    partners: Tensor,
    device: torch.device | str,
) -> MixTable:
    """Those of these views, one after the other."""
    tables = [
        draw_mix_table(config, view, rows=rows, partners=partners, device=device) for view in views
    ]
    return MixTable(*(torch.cat(parts) for parts in zip(*tables, strict=True)))


def overwritten(old: Tensor | None, new: Tensor) -> Tensor:
    """Return `new`, in the memory of `old` if there is one."""
    return new if old is None else old.copy_(new)


def pictures_by_batch(config: AugmentConfig, split: Split) -> HostPictures | None:
    """Who has the pictures when they are asked for; None if all lie on the device as they are."""
    if config.host:
        return Inline(config.host, split, seed=config.seed)
    return (lambda view, rows: split.pictures(rows)) if split.on_host else None


class Augment:
    """Turn a batch of training rows into what its epoch shows of them.

    `split` has the pictures, also those of partners, which are chosen among `rows` (int64, CPU), those
    that are trained on, or all. With `number`, 0 ... num_views - 1, it shows that view of each picture
    instead. Keeps the tables of one epoch, as drawing them costs milliseconds. Without a `host` that has
    them ready it makes the configured pipeline's pictures itself, and fetches those of a split on the host.
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
        self.config, self.split, self.number = config, split, number
        self.rows = torch.arange(len(split.labels)) if rows is None else rows
        self.host = host or pictures_by_batch(config, split)
        self.views: list[int] = []  # whose tables lie here, N rows for each copy of a row
        self.numbers: Tensor | None = None  # int64, which view each row of the tables is
        self.columns: dict[str, Tensor] = {}  # all that is looked up for a picture
        self.mix_table: MixTable | None = None

    def again(self, *, number: int | None = None) -> Augment:
        """Another one over the same canvas, with tables and host pictures of its own."""
        other = Augment(self.config, self.split, self.rows, number=number)
        if self.config.moves and self.host is None:
            other.canvas = self.canvas
        return other

    @cached_property
    def canvas(self) -> Canvas:
        """All training pictures, ready to be cropped and mirrored."""
        config = self.config
        return canvas_of(self.split.images, padding=config.crop_padding, mirrored=bool(config.flip))

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph can hold it: the host has no part in a batch."""
        return self.host is None

    def prepare(self, epoch: int) -> None:
        """Draw the tables of an epoch, unless they are here.

        They keep their addresses from epoch to epoch, since CUDA graphs read them.
        """
        views = self.config.shown(epoch) if self.number is None else [self.number]
        if views != self.views:
            self.views = views
            self.draw(views)

    def __call__(self, batch: Batch) -> View:
        self.prepare(batch.epoch)
        assert self.numbers is not None
        at = batch.places
        own = View(
            images=self.pictures(batch.rows, at),
            labels=batch.labels,
            numbers=self.numbers.index_select(0, at),
        )
        if self.mix_table is None:
            return own
        mixing = self.mix_table.take(at)
        partners_at = mixing.partner + (at - batch.rows)  # in the tables of the same copy
        others = self.pictures(mixing.partner, partners_at)
        return replace(
            own,
            images=mix(own.images, others, mixing.share, mixing.box, mixing.pasted),
            partner_labels=self.split.labels.index_select(0, mixing.partner),
            share=mixing.share,
        )

    def draw(self, views: list[int]) -> None:
        """Draw what the configuration needs for these views, one for each copy of a row."""
        config, size = self.config, len(self.split.labels)
        device = self.split.labels.device
        draw = draw_table if self.number is None else numbered_table
        tables = [draw(config, view, rows=size, device=device) for view in views]
        numbers = torch.cat(
            [
                view_numbers(config, table)
                if config.views == "all"
                else torch.full((size,), view, device=device)
                for view, table in zip(views, tables, strict=True)
            ]
        )
        self.numbers = overwritten(self.numbers, numbers)
        columns = [self.columns_of(table) for table in tables]
        self.columns = {
            name: overwritten(self.columns.get(name), torch.cat([part[name] for part in columns]))
            for name in columns[0]
        }
        if config.mixes:
            mixing = draw_mix_tables(config, views, rows=size, partners=self.rows, device=device)
            before = self.mix_table or (None,) * len(mixing)
            self.mix_table = MixTable(*map(overwritten, before, mixing))

    def columns_of(self, table: AugmentTable) -> dict[str, Tensor]:
        """What is looked up for a picture, [N, ...] each; where its crop begins is known by now."""
        config = self.config
        columns = dict(table.changes)
        if config.vertical_flip:
            columns["vertical_flip"] = table.vertical_flip
        if config.cutout:
            columns |= {"hole_y": table.hole_y, "hole_x": table.hole_x}
        moved = (table.shift_y, table.shift_x, table.flip)
        if config.moves and self.host:  # whose pictures are known batch by batch
            columns |= dict(zip(("shift_y", "shift_x", "flip"), moved, strict=True))
        elif config.moves:
            rows = torch.arange(len(table.flip), device=table.flip.device)
            columns["place"] = self.canvas.places(rows, *moved)
        return columns

    def pictures(self, rows: Tensor, at: Tensor) -> Tensor:
        """The rows (int64 [B]) under the parameters `at` (int64 [B]) their places in the tables."""
        config = self.config
        own = {name: column.index_select(0, at) for name, column in self.columns.items()}
        if self.host:
            images = self.host(self.views[0], rows)
            if config.moves:
                canvas = canvas_of(images, padding=config.crop_padding, mirrored=bool(config.flip))
                along = torch.arange(len(rows), device=rows.device)
                images = canvas.cut(
                    canvas.places(along, own["shift_y"], own["shift_x"], own["flip"])
                )
        elif config.moves:
            images = self.canvas.cut(own["place"])
        else:
            images = self.split.images.index_select(0, rows)
        if config.vertical_flip:
            images = torch.where(each(own["vertical_flip"]), images.flip(2), images)
        for name, change in config.changes.items():
            images = change(images, own[name])
        if config.cutout:
            images = cutout(images, own["hole_y"], own["hole_x"], config.cutout)
        return images
