"""The parameters of each image's augmentation, drawn for a whole epoch at once, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cifar_dist.data.augment.image_ops import SIDE
from cifar_dist.data.augment.padded_images import crop_offsets
from cifar_dist.data.augment.transforms import named_transforms
from cifar_dist.data.batches import send
from cifar_dist.utils.random import KeyedRandom, derive_seed

if TYPE_CHECKING:
    from cifar_dist.data.augment.augmentation import AugmentConfig


class AugmentTable(NamedTuple):
    """One view's parameters, a row for each row of the split; int64 and bool [N]."""

    shift_y: Tensor  # -crop_padding ... crop_padding
    shift_x: Tensor
    flip: Tensor
    hole_y: Tensor  # the hole's centre, 0 ... 31; it may stick out at the border
    hole_x: Tensor
    vflip: Tensor
    transforms: dict[str, Tensor]  # [N, ...] for each of config.changes


class MixTable(NamedTuple):
    """One view's partners, a row for each row of the split."""

    partner: Tensor  # int64 [N], the row that is mixed in
    lam: Tensor  # f32 [N], how much of the picture stays the row's own; 1: nothing is mixed in
    box: Tensor  # int64 [N, 4], where the partner's pixels are pasted: top, bottom, left, right
    pasted: Tensor  # bool [N], pasted into the box (CutMix) rather than blended (MixUp)

    def take(self, rows: Tensor) -> MixTable:
        return MixTable(*(column.index_select(0, rows) for column in self))


def draw_table(config: AugmentConfig, view: int, *, num_images: int) -> AugmentTable:
    """Draw the parameters of a view for all rows, each column from a key of its own."""
    draws = KeyedRandom(what="augment", seed=config.seed, view=view, rows=num_images)
    padding = config.crop_padding
    return AugmentTable(
        shift_y=draws.integers("shift_y", -padding, padding + 1),
        shift_x=draws.integers("shift_x", -padding, padding + 1),
        flip=draw_flips(config, draws),
        hole_y=draws.integers("hole_y", 0, SIDE),
        hole_x=draws.integers("hole_x", 0, SIDE),
        vflip=draws.integers("vertical_flip", 0, 1 + config.vflip).bool(),
        transforms=draw_transforms(config, draws),
    )


def draw_flips(config: AugmentConfig, draws: KeyedRandom) -> Tensor:
    """Which pictures are mirrored, bool [N]."""
    if config.hflip == "alternate":
        first = replace(draws, view=0).integers("flip", 0, 2)
        return (first + draws.view) % 2 == 1
    return draws.integers("flip", 0, 1 + config.hflip).bool()


def draw_transforms(config: AugmentConfig, draws: KeyedRandom) -> dict[str, Tensor]:
    """The column of each change, by name."""
    columns = {}
    for name, change in named_transforms(config).items():
        own = draws.scoped(name)
        columns[name] = change.draw(own, own.uniform("applied", 0, 1) < change.p)
    group = config.one_of.draw(draws.scoped("one_of")) if config.one_of else {}
    return columns | {f"one_of.{name}": column for name, column in group.items()}


def table_for_view(config: AugmentConfig, view_id: int, *, num_images: int) -> AugmentTable:
    """The table in which every row shows its view `number`, 0 ... num_views - 1."""
    table = draw_table(config, view_id, num_images=num_images)
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
    """Which of all views each row of the table shows, int64; the way back of `numbered_table`."""
    padding = config.crop_padding
    shifts = (table.shift_y + padding) * (2 * padding + 1) + table.shift_x + padding
    return shifts * (1 + bool(config.hflip)) + table.flip


def draw_mix_table(
    config: AugmentConfig, view: int, *, num_images: int, partners: Tensor
) -> MixTable:
    """Draw each row's partner among `partners` (int64) and how much of it shows.

    A share is drawn from Beta(alpha, alpha). CutMix's box has the area 1 - share around a uniform
    centre; what sticks out is cut off, and the share is that of the pixels which really stay.
    """

    def stream(column: str) -> numpy.random.Generator:
        keyed = numpy.random.Philox(derive_seed("augment", column, config.seed, view))
        return numpy.random.Generator(keyed)

    def shares(alpha: float) -> Any:
        return stream("share").beta(alpha, alpha, num_images) if alpha else numpy.ones(num_images)

    chosen = stream("partner").integers(len(partners), size=num_images)
    cutmix_share = float(config.cutmix > 0) / (1 + (config.mixup > 0))
    pasted = stream("pasted").random(num_images) < cutmix_share
    share = numpy.where(pasted, shares(config.cutmix), shares(config.mixup))
    share[stream("mix").random(num_images) >= config.mix_probability] = 1.0

    half = SIDE * numpy.sqrt(1 - share) / 2
    centres = stream("box").random((2, num_images)) * SIDE
    edges = [edge for centre in centres for edge in (centre - half, centre + half)]
    box = numpy.stack(edges, axis=1).round().clip(0, SIDE).astype(numpy.int64)
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    share = numpy.where(pasted, 1 - area / SIDE**2, share)
    return MixTable(
        partner=partners.cpu()[torch.from_numpy(chosen)],
        lam=torch.from_numpy(share).float(),
        box=torch.from_numpy(box),
        pasted=torch.from_numpy(pasted),
    )


def draw_mix_tables(
    config: AugmentConfig, views: list[int], *, num_images: int, partners: Tensor
) -> MixTable:
    """Draw the partners of several views, one after the other."""
    tables = [
        draw_mix_table(config, view, num_images=num_images, partners=partners) for view in views
    ]
    return MixTable(*(torch.cat(parts) for parts in zip(*tables, strict=True)))


class EpochTables(NamedTuple):
    """All that an epoch looks up, N rows for each of its views."""

    view_ids: Tensor  # int64, which view each row is
    columns: dict[str, Tensor]  # parameters of the image, by name
    mixing: MixTable | None

    def overwrite(self, old: EpochTables | None, device: torch.device) -> EpochTables:
        """Copy them to a device, to the addresses of `old` if there is one: CUDA graphs read these."""
        if old is None:
            return EpochTables(
                send(self.view_ids, device),
                {name: send(column, device) for name, column in self.columns.items()},
                MixTable(*(send(column, device) for column in self.mixing))
                if self.mixing
                else None,
            )
        for kept, new in zip(tree_leaves(old), tree_leaves(self), strict=True):
            if kept is not None:
                kept.copy_(send(new, device))
        return old


def draw_epoch(
    config: AugmentConfig,
    views: list[int],
    *,
    rows: int,
    partners: Tensor,
    numbered: bool,
    on_host: bool,
) -> EpochTables:
    """Draw what the configuration needs for these views of so many rows, on the CPU.

    With `numbered` each is that view of all rows (`numbered_table`). With `on_host` images come batch
    by batch, so where a crop begins is not known yet.
    """
    draw = table_for_view if numbered else draw_table
    tables = [draw(config, view, num_images=rows) for view in views]
    numbers = [
        view_ids(config, table) if config.views == "all" else torch.full((rows,), view)
        for view, table in zip(views, tables, strict=True)
    ]
    columns = [columns_of(config, table, on_host=on_host) for table in tables]
    return EpochTables(
        torch.cat(numbers),
        {name: torch.cat([part[name] for part in columns]) for name in columns[0]},
        draw_mix_tables(config, views, num_images=rows, partners=partners)
        if config.uses_mixing
        else None,
    )


def columns_of(config: AugmentConfig, table: AugmentTable, *, on_host: bool) -> dict[str, Tensor]:
    """Return what is looked up for an image, [N, ...] each."""
    columns = dict(table.transforms)
    if config.vflip:
        columns["vflip"] = table.vflip
    if config.cutout:
        columns |= {"hole_y": table.hole_y, "hole_x": table.hole_x}
    moved = (table.shift_y, table.shift_x, table.flip)
    if config.crops_or_flips and on_host:
        columns |= dict(zip(("shift_y", "shift_x", "flip"), moved, strict=True))
    elif config.crops_or_flips:
        rows = torch.arange(len(table.flip))
        columns["place"] = crop_offsets(
            rows, *moved, images=len(table.flip), padding=config.crop_padding
        )
    return columns
