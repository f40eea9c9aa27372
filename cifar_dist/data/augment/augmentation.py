"""Batch -> View: a sample's picture is a row in a table.

For each view (the epoch, or epoch % views) every rank draws the same parameters for all N rows.
What a sample looks like depends on (augment.seed, view, row), never on batch, rank or world size.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from cifar_dist.data.augment.albumentations_buffer import ImageSource, InlineImages
from cifar_dist.data.augment.albumentations_pipeline import check_names
from cifar_dist.data.augment.image_ops import SIDE, cutout, mix, per_sample
from cifar_dist.data.augment.padded_images import PaddedImages, pad_images
from cifar_dist.data.augment.policies import RandAugment, TrivialAugment
from cifar_dist.data.augment.tables import EpochTables, draw_epoch
from cifar_dist.data.augment.transforms import (
    Affine,
    ColorJitter,
    Erasing,
    OneOf,
    Transform,
    named_transforms,
)
from cifar_dist.data.batches import Batch
from cifar_dist.data.dataset import Split
from cifar_dist.utils.config import Count, Fraction, Index, NonNegative, config

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
    albumentations: tuple[dict[str, dict[str, Any]], ...] | None = None
    workers: Index = 2  # a process; 0: the training process makes its own pictures
    crop_padding: Padding = 0  # pixels of black border before the random crop (He et al. 2015, 4.2)
    # left to right, one picture in two; `alternate`: by lot at first, then every other epoch, so that two
    # epochs in a row show both sides of each picture (Jordan 2024, arXiv 2404.00498, section 3.6)
    hflip: bool | Literal["alternate"] = False
    vflip: bool = False  # upside down, one picture in two
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
    repeated: Count = 1  # views of each row in a batch (Hoffer et al. 2020, arXiv 1901.09335)

    def __post_init__(self) -> None:
        if self.albumentations is not None:
            check_names(self.albumentations)
            if self.repeated > 1:
                raise ValueError(
                    "albumentations makes one view an epoch, repeated wants more: remove one"
                )
        if isinstance(self.views, int) and self.views % 2 and self.hflip == "alternate":
            raise ValueError(
                f"flip: alternate shows both sides in two views, and views={self.views} is odd: add one"
            )
        if self.views == "all" and self.hflip == "alternate":
            raise ValueError("views: all draws flips of its own: write flip: true")
        others = ("albumentations", "vflip", "one_of", "cutout", "mixup", "cutmix")
        uncounted = [*named_transforms(self), *(name for name in others if vars(self)[name])]
        if self.views == "all" and uncounted:
            raise ValueError(
                f"views: all can count crops and flips only; remove {', '.join(uncounted)}, or "
                "give a number of views"
            )

    @property
    def uses_mixing(self) -> bool:
        return bool((self.mixup or self.cutmix) and self.mix_probability)

    @property
    def transforms(self) -> dict[str, Transform]:
        """What each picture goes through between crop and cutout, by name and in order."""
        group = named_transforms(self.one_of) if self.one_of else {}
        changes = named_transforms(self) | {f"one_of.{name}": one for name, one in group.items()}
        return dict(sorted(changes.items(), key=lambda named: named[0] == "erasing"))  # stays last

    @property
    def crops_or_flips(self) -> bool:
        """Whether pictures are cropped or mirrored left to right."""
        return bool(self.crop_padding or self.hflip)

    @property
    def num_views(self) -> int | None:
        """How many different views a picture has; None without an end."""
        if self.views == "all":
            return (2 * self.crop_padding + 1) ** 2 * (1 + bool(self.hflip))
        return self.views

    def views_in_epoch(self, epoch: int) -> list[int]:
        """Which views of the data an epoch shows: one, or one for each copy of a row."""
        first = epoch * self.repeated
        views = range(first, first + self.repeated)
        return [view % self.views if isinstance(self.views, int) else view for view in views]


@dataclass(frozen=True, kw_only=True)
class AugmentedBatch:
    """What an epoch shows of a batch.

    Where partners are mixed in, a loss is share * loss(labels) + (1 - share) * loss(partner_labels).
    """

    images: Tensor  # uint8 [B, 3, 32, 32]
    labels: Tensor  # int64 [B]
    view_ids: Tensor  # int64 [B], which of its views each picture is; a row and a number name it
    partner_labels: Tensor | None = None  # int64 [B]
    lam: Tensor | None = None  # f32 [B], how much of the picture is the row's own

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in vars(self).values() if tensor is not None]

    def __getitem__(self, samples: slice) -> AugmentedBatch:
        """Return some of the samples, in the same memory."""
        columns = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return AugmentedBatch(**{name: tensor[samples] for name, tensor in columns.items()})


def uses_image_source(config: AugmentConfig, split: Split) -> ImageSource | None:
    """Who has the pictures when they are asked for; None if all lie on the device as they are."""
    if config.albumentations:
        return InlineImages(config.albumentations, split, seed=config.seed)
    return (lambda view, rows: split.gather(rows)) if split.on_host else None


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
        host: ImageSource | None = None,
        prefetch: bool | None = None,
    ) -> None:
        self.config, self.split, self.number = config, split, number
        self.rows = torch.arange(len(split.labels)) if rows is None else rows
        self.host = host or uses_image_source(config, split)
        self.views: list[int] = []  # whose tables lie here, N rows for each copy of a row
        self.tables: EpochTables | None = None
        # A GPU would wait for the next epoch's tables; a CPU has to draw them anyhow.
        self.ahead = prefetch if prefetch is not None else split.labels.is_cuda
        self.drawing: tuple[list[int], Future[EpochTables]] | None = None

    def clone(self, *, number: int | None = None) -> Augment:
        """Another one over the same canvas, with tables and host pictures of its own."""
        other = Augment(self.config, self.split, self.rows, number=number)
        if self.config.crops_or_flips and self.host is None:
            other.padded_images = self.padded_images
        return other

    @cached_property
    def padded_images(self) -> PaddedImages:
        """All training pictures, ready to be cropped and mirrored."""
        config = self.config
        return pad_images(
            self.split.images, padding=config.crop_padding, mirrored=bool(config.hflip)
        )

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold it: the host has no part in a batch."""
        return self.host is None

    def prepare(self, epoch: int) -> None:
        """Draw the tables of an epoch, unless they are here.

        They keep their addresses from epoch to epoch, since CUDA graphs read them.
        """
        views = self.views_of(epoch)
        if views == self.views:
            return
        ready, self.drawing = self.drawing, None
        drawn = ready[1].result() if ready and ready[0] == views else self.draw(views)
        self.tables = drawn.overwrite(self.tables, self.split.labels.device)
        self.views = views
        following = self.views_of(epoch + 1)
        if self.ahead and following != views:
            thread = ThreadPoolExecutor(1, "augment")
            self.drawing = following, thread.submit(self.draw, following)
            thread.shutdown(wait=False)

    def views_of(self, epoch: int) -> list[int]:
        return self.config.views_in_epoch(epoch) if self.number is None else [self.number]

    def draw(self, views: list[int]) -> EpochTables:
        """Draw the tables of these views, one for each copy of a row."""
        return draw_epoch(
            self.config,
            views,
            rows=len(self.split.labels),
            partners=self.rows,
            numbered=self.number is not None,
            on_host=self.host is not None,
        )

    def __call__(self, batch: Batch) -> AugmentedBatch:
        self.prepare(batch.epoch)
        assert self.tables
        at = batch.table_index
        own = AugmentedBatch(
            images=self.gather_images(batch.rows, at),
            labels=batch.labels,
            view_ids=self.tables.view_ids.index_select(0, at),
        )
        if self.tables.mixing is None:
            return own
        mixing = self.tables.mixing.take(at)
        partners_at = mixing.partner + (at - batch.rows)  # in the tables of the same copy
        others = self.gather_images(mixing.partner, partners_at)
        return replace(
            own,
            images=mix(own.images, others, mixing.lam, mixing.box, mixing.pasted),
            partner_labels=self.split.labels.index_select(0, mixing.partner),
            lam=mixing.lam,
        )

    def gather_images(self, rows: Tensor, at: Tensor) -> Tensor:
        """The rows (int64 [B]) under the parameters `at` (int64 [B]) their places in the tables."""
        config = self.config
        assert self.tables
        own = {name: column.index_select(0, at) for name, column in self.tables.columns.items()}
        if self.host:
            images = self.host(self.views[0], rows)
            if config.crops_or_flips:
                canvas = pad_images(
                    images, padding=config.crop_padding, mirrored=bool(config.hflip)
                )
                along = torch.arange(len(rows), device=rows.device)
                images = canvas.crop(
                    canvas.offsets(along, own["shift_y"], own["shift_x"], own["flip"])
                )
        elif config.crops_or_flips:
            images = self.padded_images.crop(own["place"])
        else:
            images = self.split.images.index_select(0, rows)
        if config.vflip:
            images = torch.where(per_sample(own["vflip"]), images.flip(2), images)
        for name, change in config.transforms.items():
            images = change(images, own[name])
        if config.cutout:
            images = cutout(images, own["hole_y"], own["hole_x"], config.cutout)
        return images
