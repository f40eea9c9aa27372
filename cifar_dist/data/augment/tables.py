"""Draw the augmentation parameters of every image of an epoch at once, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from cifar_dist.data.augment.padded_images import crop_offsets
from cifar_dist.data.augment.transforms import named_transforms
from cifar_dist.data.batches import to_device
from cifar_dist.utils.random import KeyedRandom, derive_seed

if TYPE_CHECKING:
    from cifar_dist.data.augment.augmentation import AugmentConfig


class AugmentTable(NamedTuple):
    """The image parameters of one view, for all N rows of the split."""

    shift_y: Tensor  # int64 [N], -crop_padding ... crop_padding
    shift_x: Tensor
    flip: Tensor  # bool [N]
    hole_y: Tensor  # int64 [N], center of the hole, 0 ... S - 1; it may extend beyond the border
    hole_x: Tensor
    vflip: Tensor  # bool [N]
    transforms: dict[str, Tensor]  # [N, ...] for each of config.transforms


class MixTable(NamedTuple):
    """The mixing parameters of one view, for all N rows of the split."""

    partner: Tensor  # int64 [N], the row that is mixed in
    lam: Tensor  # f32 [N], weight of the image against its partner; 1: not mixed
    box: Tensor  # int64 [N, 4], where the partner is pasted: top, bottom, left, right
    pasted: Tensor  # bool [N], pasted into the box (CutMix, ResizeMix) rather than blended (MixUp)
    resized: (
        Tensor | None
    )  # bool [N], all of the partner is resized to the box; None without ResizeMix

    def select(self, index: Tensor) -> MixTable:
        return tree_map_only(Tensor, lambda column: column.index_select(0, index), self)


def draw_table(
    config: AugmentConfig, view: int, *, num_images: int, image_size: int
) -> AugmentTable:
    """Draw the parameters of a view for all rows, each column from a separate key.

    `image_size` is that of the data, in pixels.
    """
    random = KeyedRandom(purpose="augment", seed=config.seed, view=view, rows=num_images)
    padding = config.crop_padding
    return AugmentTable(
        shift_y=random.integers("shift_y", -padding, padding + 1),
        shift_x=random.integers("shift_x", -padding, padding + 1),
        flip=draw_flips(config, random),
        hole_y=random.integers("hole_y", 0, image_size),
        hole_x=random.integers("hole_x", 0, image_size),
        vflip=random.integers("vertical_flip", 0, 1 + config.vflip).bool(),
        transforms=draw_transforms(config, random, image_size),
    )


def draw_flips(config: AugmentConfig, random: KeyedRandom) -> Tensor:
    """Return which images are flipped horizontally, bool [N]."""
    if config.hflip == "alternate":
        first = replace(random, view=0).integers("flip", 0, 2)
        return (first + random.view) % 2 == 1
    return random.integers("flip", 0, 1 + config.hflip).bool()


def draw_transforms(
    config: AugmentConfig, random: KeyedRandom, image_size: int
) -> dict[str, Tensor]:
    """Return the column of each transform by name, [N, ...]."""
    columns = {}
    for name, transform in named_transforms(config).items():
        scoped = random.scoped(name)
        applied = scoped.uniform("applied", 0, 1) < transform.p
        columns[name] = transform.draw(scoped, applied, image_size)
    group = config.one_of.draw(random.scoped("one_of"), image_size) if config.one_of else {}
    return columns | {f"one_of.{name}": column for name, column in group.items()}


def table_for_view(
    config: AugmentConfig, view_id: int, *, num_images: int, image_size: int
) -> AugmentTable:
    """Return the parameters that give every row the view `view_id` (0 to num_views - 1)."""
    table = draw_table(config, view_id, num_images=num_images, image_size=image_size)
    if config.views != "all":
        return table
    shifts, flip = divmod(view_id, 1 + bool(config.hflip))
    shift_y, shift_x = divmod(shifts, 2 * config.crop_padding + 1)
    return table._replace(
        shift_y=torch.full_like(table.shift_y, shift_y - config.crop_padding),
        shift_x=torch.full_like(table.shift_x, shift_x - config.crop_padding),
        flip=torch.full_like(table.flip, bool(flip)),
    )


def view_ids(config: AugmentConfig, table: AugmentTable) -> Tensor:
    """Return the view id of each row of a table under `views: all`, int64 [N].

    This is the inverse of `table_for_view`.
    """
    padding = config.crop_padding
    shifts = (table.shift_y + padding) * (2 * padding + 1) + table.shift_x + padding
    return shifts * (1 + bool(config.hflip)) + table.flip


def draw_mix_table(
    config: AugmentConfig, view: int, *, num_images: int, image_size: int, partners: Tensor
) -> MixTable:
    """Draw each row's partner among `partners` (int64) and its mixing parameters.

    lam is drawn from Beta(alpha, alpha). CutMix's box has the relative area 1 - lam around a uniform
    center and is clipped at the border. The side of ResizeMix's box is uniform in a range, its place
    uniform inside the image. For both, lam is then the share of pixels that are kept.
    """

    def stream(column: str) -> numpy.random.Generator:
        keyed = numpy.random.Philox(derive_seed("augment", column, config.seed, view))
        return numpy.random.Generator(keyed)

    def draw_lam(alpha: float) -> Any:
        return stream("share").beta(alpha, alpha, num_images) if alpha else numpy.ones(num_images)

    partner = stream("partner").integers(len(partners), size=num_images)
    kinds = [name for name in ("cutmix", "resizemix", "mixup") if getattr(config, name)]
    kind = (stream("pasted").random(num_images) * len(kinds)).astype(int)
    pasted, resized = (
        kind == kinds.index(name) if name in kinds else numpy.zeros(num_images, bool)
        for name in ("cutmix", "resizemix")
    )
    lam = numpy.where(pasted, draw_lam(config.cutmix), draw_lam(config.mixup))
    lam[resized] = 0  # until the box is known
    lam[stream("mix").random(num_images) >= config.mix_probability] = 1.0

    half = image_size * numpy.sqrt(1 - lam) / 2
    centers = stream("box").random((2, num_images)) * image_size
    edges = [edge for center in centers for edge in (center - half, center + half)]
    box = numpy.stack(edges, axis=1).round().clip(0, image_size).astype(numpy.int64)
    if config.resizemix:
        low, high = config.resizemix
        side = ((low + (high - low) * stream("resized").random(num_images)) * image_size).round()
        side *= resized & (lam < 1)  # not where nothing is mixed
        start = (stream("place").random((2, num_images)) * (image_size - side + 1)).astype(int)
        inside = numpy.stack([start[0], start[0] + side, start[1], start[1] + side], axis=1)
        box = numpy.where(resized[:, None], inside, box).astype(numpy.int64)
        pasted |= resized
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    lam = numpy.where(pasted, 1 - area / image_size**2, lam)
    return MixTable(
        partner=partners.cpu()[torch.from_numpy(partner)],
        lam=torch.from_numpy(lam).float(),
        box=torch.from_numpy(box),
        pasted=torch.from_numpy(pasted),
        resized=torch.from_numpy(resized) if config.resizemix else None,
    )


def draw_mix_tables(
    config: AugmentConfig,
    views: list[int],
    *,
    num_images: int,
    image_size: int,
    partners: Tensor,
) -> MixTable:
    """Draw the mixing parameters of several views and concatenate them."""
    tables = [
        draw_mix_table(
            config, view, num_images=num_images, image_size=image_size, partners=partners
        )
        for view in views
    ]
    columns: list[Any] = [
        None if parts[0] is None else torch.cat(parts) for parts in zip(*tables, strict=True)
    ]
    return MixTable(*columns)


class EpochTables(NamedTuple):
    """The tables of one epoch: N rows for each of its views."""

    view_ids: Tensor  # int64
    columns: dict[str, Tensor]  # image parameters by name, [rows, ...] each
    mixing: MixTable | None

    def copy_to(self, target: EpochTables | None, device: torch.device) -> EpochTables:
        """Copy the tables to `device`, in place into `target` if given: CUDA graphs read them there."""
        if target is None:
            return tree_map_only(Tensor, partial(to_device, device=device), self)
        for old, new in zip(tree_leaves(target), tree_leaves(self), strict=True):
            if old is not None:
                old.copy_(to_device(new, device))
        return target


def draw_epoch(
    config: AugmentConfig,
    views: list[int],
    *,
    num_images: int,
    image_size: int,
    partners: Tensor,
    fixed_view: bool,
    crop_batches: bool,
) -> EpochTables:
    """Draw the tables of `views` that the configuration needs, on the CPU.

    With `fixed_view` all rows get that view (`table_for_view`). With `crop_batches` the images arrive
    batch by batch, so the tables contain shifts and flips instead of offsets into all padded images.
    """
    draw = table_for_view if fixed_view else draw_table
    tables = [draw(config, view, num_images=num_images, image_size=image_size) for view in views]
    ids = [
        view_ids(config, table) if config.views == "all" else torch.full((num_images,), view)
        for view, table in zip(views, tables, strict=True)
    ]
    columns = [
        image_columns(config, table, image_size=image_size, crop_batches=crop_batches)
        for table in tables
    ]
    return EpochTables(
        torch.cat(ids),
        {name: torch.cat([part[name] for part in columns]) for name in columns[0]},
        draw_mix_tables(
            config, views, num_images=num_images, image_size=image_size, partners=partners
        )
        if config.uses_mixing
        else None,
    )


def image_columns(
    config: AugmentConfig, table: AugmentTable, *, image_size: int, crop_batches: bool
) -> dict[str, Tensor]:
    """Return the columns that the configuration uses by name, [N, ...] each."""
    columns = dict(table.transforms)
    if config.vflip:
        columns["vflip"] = table.vflip
    if config.cutout:
        columns |= {"hole_y": table.hole_y, "hole_x": table.hole_x}
    crop = {"shift_y": table.shift_y, "shift_x": table.shift_x, "flip": table.flip}
    if config.crops_or_flips and crop_batches:
        columns |= crop
    elif config.crops_or_flips:
        num_images = len(table.flip)
        columns["crop_offset"] = crop_offsets(
            torch.arange(num_images),
            **crop,
            num_images=num_images,
            image_size=image_size,
            padding=config.crop_padding,
        )
    return columns
