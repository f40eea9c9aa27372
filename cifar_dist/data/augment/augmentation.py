"""Augment batches with parameters that are looked up in per-epoch tables.

For each view (the epoch, or epoch % views) every rank draws the same parameters for all N rows. An
augmented image depends on (augment.seed, view, row), never on the batch, rank or world size.
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
from cifar_dist.data.augment.image_ops import cutout, mix, per_sample, resize_into
from cifar_dist.data.augment.padded_images import PaddedImages, pad_images
from cifar_dist.data.augment.policies import AutoAugment, RandAugment, TrivialAugment
from cifar_dist.data.augment.tables import EpochTables, draw_epoch
from cifar_dist.data.augment.transforms import (
    Affine,
    ColorJitter,
    Erasing,
    OneOf,
    Transform,
    check_range,
    named_transforms,
)
from cifar_dist.data.batches import Batch
from cifar_dist.data.dataset import MAX_SIZE, Split
from cifar_dist.utils.config import Count, Fraction, Index, NonNegative, config
from cifar_dist.utils.errors import UserError

Padding = Annotated[int, Interval(ge=0, lt=MAX_SIZE)]
Hole = Annotated[int, Interval(ge=0, le=2 * MAX_SIZE)]


@config
class AugmentConfig:
    """Image augmentation, in the order in which it is applied; all off by default.

    `albumentations` is a pipeline that runs on the CPU; the transforms after it run on the device.

    `views` limits the number of different views of the data. None: a new view each epoch. A number:
    cycle through that many views. `all`: a new view each epoch, identified by its number among the
    (2 crop_padding + 1)^2 crops of an image, twice that with hflip.
    """

    seed: Index = 0  # seed of all random parameters of the augmentation
    # number of different views of each image, to cycle through; all: the views are all crops and
    # flips; null: a new view each epoch
    views: Count | Literal["all"] | None = None
    # albumentations pipeline on the CPU, a list of {Name: {arguments}}; null: none
    albumentations: tuple[dict[str, dict[str, Any]], ...] | None = None
    # albumentations workers per process; 0: run the pipeline in the training process
    workers: Index = 2
    # pixels of black border before the random crop (He et al. 2015, 4.2)
    crop_padding: Padding = 0
    # horizontal flip with probability 0.5; alternate: at random in the first epoch, then in every
    # other epoch, so that two consecutive epochs use both sides (Jordan 2024, arXiv 2404.00498, 3.6)
    hflip: bool | Literal["alternate"] = False
    vflip: bool = False  # vertical flip with probability 0.5
    affine: Affine | None = None  # rotation, translation and scaling; null: off
    color_jitter: ColorJitter | None = None  # brightness, contrast, saturation and hue; null: off
    auto_augment: AutoAugment | None = None  # AutoAugment's policy for CIFAR; null: off
    rand_augment: RandAugment | None = None  # RandAugment; null: off
    trivial_augment: TrivialAugment | None = None  # TrivialAugment Wide; null: off
    one_of: OneOf | None = None  # one of several transforms, chosen at random; null: off
    erasing: Erasing | None = None  # random erasing; null: off
    # side of one square hole, in pixels; 0: off (DeVries and Taylor 2017, arXiv 1708.04552)
    cutout: Hole = 0
    # alpha of MixUp's Beta(alpha, alpha); 0: off (Zhang et al. 2018, arXiv 1710.09412)
    mixup: NonNegative = 0.0
    # alpha of CutMix's Beta(alpha, alpha); 0: off; with mixup or resizemix, one of them at random
    # (Yun et al. 2019, arXiv 1905.04899)
    cutmix: NonNegative = 0.0
    # range of the side of ResizeMix's box, as a fraction of the image's; null: off; [0.1, 0.8] in the
    # paper (Qin et al. 2020, arXiv 2012.11101)
    resizemix: tuple[Fraction, Fraction] | None = None
    mix_probability: Fraction = 1.0  # probability of mixing an image at all
    # differently augmented copies of each image in a batch (Hoffer et al. 2020, arXiv 1901.09335)
    repeated: Count = 1

    def __post_init__(self) -> None:
        if self.resizemix:
            check_range("resizemix", self.resizemix)
        if self.albumentations is not None:
            check_names(self.albumentations)
            if self.repeated > 1:
                raise ValueError(
                    "albumentations creates one view per epoch, but repeated needs several; remove one"
                )
        if isinstance(self.views, int) and self.views % 2 and self.hflip == "alternate":
            raise ValueError(
                f"hflip: alternate needs an even number of views (got {self.views}); add one"
            )
        if self.views == "all":
            if self.hflip == "alternate":
                raise ValueError("views: all does not support hflip: alternate; set hflip: true")
            others = ("albumentations", "vflip", "one_of", "cutout", "mixup", "cutmix", "resizemix")
            unsupported = [*named_transforms(self), *(name for name in others if vars(self)[name])]
            if unsupported:
                raise ValueError(
                    f"views: all supports crops and hflip only; remove {', '.join(unsupported)}, or "
                    "give a number of views"
                )

    @property
    def uses_mixing(self) -> bool:
        return bool((self.mixup or self.cutmix or self.resizemix) and self.mix_probability)

    @property
    def transforms(self) -> dict[str, Transform]:
        """Return the transforms between flips and cutout by name, in the order of application."""
        group = named_transforms(self.one_of) if self.one_of else {}
        transforms = named_transforms(self)
        transforms |= {f"one_of.{name}": transform for name, transform in group.items()}
        return dict(sorted(transforms.items(), key=lambda item: item[0] == "erasing"))  # goes last

    @property
    def crops_or_flips(self) -> bool:
        return bool(self.crop_padding or self.hflip)

    @property
    def num_views(self) -> int | None:
        """Return the number of different views of an image, or None if it is unlimited."""
        if self.views == "all":
            return (2 * self.crop_padding + 1) ** 2 * (1 + bool(self.hflip))
        return self.views

    def views_in_epoch(self, epoch: int) -> list[int]:
        """Return the view of each copy of a row in an epoch."""
        first = epoch * self.repeated
        views = range(first, first + self.repeated)
        return [view % self.views if isinstance(self.views, int) else view for view in views]


@dataclass(frozen=True, kw_only=True)
class AugmentedBatch:
    """An augmented batch.

    With mixing, a loss is lam * loss(labels) + (1 - lam) * loss(partner_labels).
    """

    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B]
    view_ids: Tensor  # int64 [B]; (row, view id) identifies an augmented image
    partner_labels: Tensor | None = None  # int64 [B]
    lam: Tensor | None = None  # f32 [B], weight of the image against its partner

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in vars(self).values() if tensor is not None]

    def __getitem__(self, samples: slice) -> AugmentedBatch:
        """Return a slice of the samples without a copy."""
        columns = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return AugmentedBatch(**{name: tensor[samples] for name, tensor in columns.items()})


def make_image_source(config: AugmentConfig, split: Split) -> ImageSource | None:
    """Return a source that provides images batch by batch, or None if all are on the device."""
    if config.albumentations:
        return InlineImages(config.albumentations, split, seed=config.seed)
    return (lambda view, rows: split.gather(rows)) if split.on_host else None


def check_image_size(config: AugmentConfig, size: int) -> None:
    """Raise UserError for a padding or a hole that does not suit images of `size` px."""
    if config.crop_padding >= size:
        raise UserError(
            f"augment.crop_padding={config.crop_padding}: must be below the size of the images ({size} "
            "px), or a crop could miss the image; lower it"
        )
    if config.cutout > 2 * size:
        raise UserError(
            f"augment.cutout={config.cutout}: covers every image of {size} px; set at most {2 * size}"
        )


class Augment:
    """Augment batches of training rows.

    Mixing partners are chosen among `rows` (int64, CPU), the training rows; the default is all rows of
    `split`. With `view_id` (0 to num_views - 1) every image gets that view instead of the epoch's.
    `image_source` provides the images of an albumentations pipeline, or of a split on the host; by
    default they are computed or copied when a batch needs them. The tables of one epoch are kept,
    because drawing them takes milliseconds; `prefetch` draws those of the next epoch in a thread.
    """

    def __init__(
        self,
        config: AugmentConfig,
        split: Split,
        rows: Tensor | None = None,
        *,
        view_id: int | None = None,
        image_source: ImageSource | None = None,
        prefetch: bool | None = None,
    ) -> None:
        check_image_size(config, split.image_size)
        self.config, self.split, self.view_id = config, split, view_id
        self.rows = torch.arange(len(split.labels)) if rows is None else rows
        self.image_source = image_source or make_image_source(config, split)
        self.views: list[int] = []  # the views of `tables`
        self.tables: EpochTables | None = None
        # A GPU would be idle while the next tables are drawn; on the CPU a thread saves no time.
        self.prefetch = prefetch if prefetch is not None else split.labels.is_cuda
        self.next_tables: tuple[list[int], Future[EpochTables]] | None = None

    def clone(self, *, view_id: int | None = None) -> Augment:
        """Return another Augment that shares the padded images, but not the tables."""
        other = Augment(self.config, self.split, self.rows, view_id=view_id)
        if self.config.crops_or_flips and self.image_source is None:
            other.padded_images = self.padded_images
        return other

    @cached_property
    def padded_images(self) -> PaddedImages:
        return self.pad(self.split.images)

    def pad(self, images: Tensor) -> PaddedImages:
        config = self.config
        return pad_images(images, padding=config.crop_padding, mirrored=bool(config.hflip))

    @property
    def capturable(self) -> bool:
        """Return whether a CUDA graph can capture the augmentation: no batch needs the host."""
        return self.image_source is None

    def prepare(self, epoch: int) -> None:
        """Draw the tables of an epoch unless they are the current ones.

        Their memory addresses never change, because CUDA graphs read them.
        """
        views = self.views_of(epoch)
        if views == self.views:
            return
        ready, self.next_tables = self.next_tables, None
        tables = ready[1].result() if ready and ready[0] == views else self.draw_tables(views)
        self.tables = tables.copy_to(self.tables, self.split.labels.device)
        self.views = views
        next_views = self.views_of(epoch + 1)
        if self.prefetch and next_views != views:
            thread = ThreadPoolExecutor(1, "augment")
            self.next_tables = next_views, thread.submit(self.draw_tables, next_views)
            thread.shutdown(wait=False)

    def views_of(self, epoch: int) -> list[int]:
        return self.config.views_in_epoch(epoch) if self.view_id is None else [self.view_id]

    def draw_tables(self, views: list[int]) -> EpochTables:
        return draw_epoch(
            self.config,
            views,
            num_images=len(self.split.labels),
            image_size=self.split.image_size,
            partners=self.rows,
            fixed_view=self.view_id is not None,
            crop_batches=self.image_source is not None,
        )

    def __call__(self, batch: Batch) -> AugmentedBatch:
        self.prepare(batch.epoch)
        assert self.tables
        index = batch.table_index
        augmented = AugmentedBatch(
            images=self.augment_rows(batch.rows, index),
            labels=batch.labels,
            view_ids=self.tables.view_ids.index_select(0, index),
        )
        if self.tables.mixing is None:
            return augmented
        mixing = self.tables.mixing.select(index)
        partner_index = mixing.partner + (index - batch.rows)  # in the table of the same copy
        partners = self.augment_rows(mixing.partner, partner_index)
        if mixing.resized is not None:
            partners = resize_into(partners, mixing.box, mixing.resized)
        return replace(
            augmented,
            images=mix(augmented.images, partners, mixing.lam, mixing.box, mixing.pasted),
            partner_labels=self.split.labels.index_select(0, mixing.partner),
            lam=mixing.lam,
        )

    def augment_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        """Return the images of `rows` (int64 [B]) with the parameters at `index` (int64 [B])."""
        config = self.config
        assert self.tables
        params = {
            name: column.index_select(0, index) for name, column in self.tables.columns.items()
        }
        if self.image_source:
            images = self.image_source(self.views[0], rows)
            if config.crops_or_flips:
                padded = self.pad(images)
                positions = torch.arange(len(rows), device=rows.device)
                images = padded.crop(
                    padded.offsets(positions, params["shift_y"], params["shift_x"], params["flip"])
                )
        elif config.crops_or_flips:
            images = self.padded_images.crop(params["crop_offset"])
        else:
            images = self.split.images.index_select(0, rows)
        if config.vflip:
            images = torch.where(per_sample(params["vflip"]), images.flip(2), images)
        for name, transform in config.transforms.items():
            images = transform(images, params[name])
        if config.cutout:
            images = cutout(images, params["hole_y"], params["hole_x"], config.cutout)
        return images
