"""A picture is a function of (augment.seed, view, row); the ops equal the plain way to write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.data.arrow import Split, load_split
from cifar_dist.data.augment import (
    MEAN_COLOUR,
    Augment,
    AugmentConfig,
    crop_flip,
    cutout,
    draw_table,
)
from cifar_dist.data.batches import take

ALL = AugmentConfig(crop_padding=4, flip=True, cutout=8)
CPU = torch.device("cpu")


@pytest.fixture
def split(data: Path) -> Split:
    return load_split(data, "train")


def view(split: Split, rows: list[int], *, epoch: int, config: AugmentConfig = ALL) -> Tensor:
    batch = take(split, torch.tensor(rows), epoch=epoch, shard=0)
    return Augment(config, rows=64)(batch).images


def test_a_picture_does_not_depend_on_its_batch(split: Split) -> None:
    together = view(split, list(range(64)), epoch=3)
    alone = torch.cat([view(split, [row], epoch=3) for row in range(64)])
    shuffled = torch.randperm(64, generator=torch.manual_seed(0))
    assert torch.equal(together, alone)
    assert torch.equal(together[shuffled], view(split, shuffled.tolist(), epoch=3))


def test_views_differ_and_come_back(split: Split) -> None:
    rows = list(range(64))
    assert not torch.equal(view(split, rows, epoch=0), view(split, rows, epoch=1))
    two = AugmentConfig(crop_padding=4, flip=True, views=2)
    assert torch.equal(
        view(split, rows, epoch=1, config=two), view(split, rows, epoch=5, config=two)
    )
    other = AugmentConfig(crop_padding=4, flip=True, cutout=8, seed=1)
    assert not torch.equal(view(split, rows, epoch=0), view(split, rows, epoch=0, config=other))


def test_columns_do_not_move_each_other() -> None:
    """Another padding leaves flips and holes as they were: each column has its own key."""
    small = draw_table(AugmentConfig(flip=True, crop_padding=2), view=0, rows=500, device=CPU)
    large = draw_table(AugmentConfig(flip=True, crop_padding=4), view=0, rows=500, device=CPU)
    assert torch.equal(small.flip, large.flip)
    assert torch.equal(small.hole_y, large.hole_y)
    assert not torch.equal(small.shift_y, large.shift_y)


def test_crop_and_flip_equal_pad_slice_and_mirror(split: Split) -> None:
    table = draw_table(ALL, view=0, rows=64, device=CPU)
    padded = F.pad(split.images, (4, 4, 4, 4))
    for row in range(64):
        y, x = int(table.shift_y[row]) + 4, int(table.shift_x[row]) + 4
        expected = padded[row, :, y : y + 32, x : x + 32]
        if table.flip[row]:
            expected = expected.flip(-1)
        one = slice(row, row + 1)
        found = crop_flip(
            split.images[one], table.shift_y[one], table.shift_x[one], table.flip[one]
        )
        assert torch.equal(found[0], expected)


def test_cutout_covers_a_clipped_square_with_the_mean() -> None:
    images = torch.full((3, 3, 32, 32), 7, dtype=torch.uint8)
    holes = cutout(images, torch.tensor([16, 0, 31]), torch.tensor([16, 0, 10]), 8)
    covered = (holes != 7).all(1)
    assert covered.sum((1, 2)).tolist() == [64, 16, 5 * 8]
    assert covered[0, 12:20, 12:20].all()
    assert covered[1, :4, :4].all()
    assert covered[2, 27:, 6:14].all()
    assert holes[0, :, 16, 16].tolist() == list(MEAN_COLOUR)


def test_draws_are_uniform() -> None:
    table = draw_table(ALL, view=0, rows=50_000, device=CPU)
    for column, low, high in (
        (table.shift_y, -4, 4),
        (table.shift_x, -4, 4),
        (table.flip.long(), 0, 1),
        (table.hole_y, 0, 31),
        (table.hole_x, 0, 31),
    ):
        counts = (column - low).bincount(minlength=high - low + 1).double()
        assert len(counts) == high - low + 1
        expected = 50_000 / len(counts)
        chi_square = ((counts - expected).square() / expected).sum().item()
        assert chi_square < len(counts) + 5 * (2 * len(counts)) ** 0.5


def test_no_augmentation_leaves_the_picture_alone(split: Split) -> None:
    assert torch.equal(view(split, list(range(64)), epoch=0, config=AugmentConfig()), split.images)
