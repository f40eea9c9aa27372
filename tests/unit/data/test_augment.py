"""Augmented images: a function of (augment.seed, view, row), equal to straightforward formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.augment.image_ops import MEAN_COLOR, cutout, mix
from cifar_dist.data.augment.tables import draw_mix_table, draw_table, table_for_view, view_ids
from cifar_dist.data.batches import BatchPlan, gather_batch, train_batches
from cifar_dist.data.dataset import Split, load_split

ALL = AugmentConfig(crop_padding=4, hflip=True, cutout=8)
ROWS = torch.arange(64)


def leaves(table: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(table) if leaf is not None]


@pytest.fixture
def split(data: Path) -> Split:
    return load_split(data, "train")


def view(split: Split, rows: list[int], *, epoch: int, config: AugmentConfig = ALL) -> Tensor:
    batch = gather_batch(split, torch.tensor(rows), epoch=epoch, micro_batch=0)
    return Augment(config, split)(batch).images


def test_image_does_not_depend_on_its_batch(split: Split) -> None:
    batch = view(split, list(range(64)), epoch=3)
    single = torch.cat([view(split, [row], epoch=3) for row in range(64)])
    shuffled = torch.randperm(64, generator=torch.manual_seed(0))
    assert torch.equal(batch, single)
    assert torch.equal(batch[shuffled], view(split, shuffled.tolist(), epoch=3))


def test_views_differ_and_repeat_after_the_number_of_views(split: Split) -> None:
    rows = list(range(64))
    assert not torch.equal(view(split, rows, epoch=0), view(split, rows, epoch=1))
    two = AugmentConfig(crop_padding=4, hflip=True, views=2)
    assert torch.equal(
        view(split, rows, epoch=1, config=two), view(split, rows, epoch=5, config=two)
    )
    other = AugmentConfig(crop_padding=4, hflip=True, cutout=8, seed=1)
    assert not torch.equal(view(split, rows, epoch=0), view(split, rows, epoch=0, config=other))


def test_columns_are_independent() -> None:
    """Another padding does not change flips and holes, because each column has a separate key."""
    small = draw_table(
        AugmentConfig(hflip=True, crop_padding=2), view=0, num_images=500, image_size=32
    )
    large = draw_table(
        AugmentConfig(hflip=True, crop_padding=4), view=0, num_images=500, image_size=32
    )
    assert torch.equal(small.flip, large.flip)
    assert torch.equal(small.hole_y, large.hole_y)
    assert not torch.equal(small.shift_y, large.shift_y)


def test_vflip_follows_the_crop(split: Split) -> None:
    hflip_only = view(
        split, list(range(64)), epoch=0, config=AugmentConfig(crop_padding=4, hflip=True)
    )
    config = AugmentConfig(crop_padding=4, hflip=True, vflip=True)
    both = view(split, list(range(64)), epoch=0, config=config)
    flipped = draw_table(config, view=0, num_images=64, image_size=32).vflip
    assert 10 < flipped.sum() < 54
    assert torch.equal(both[~flipped], hflip_only[~flipped])
    assert torch.equal(both[flipped], hflip_only[flipped].flip(2))


def test_alternating_flips_use_both_sides_in_two_epochs(split: Split) -> None:
    config = AugmentConfig(hflip="alternate")
    images = [view(split, list(range(64)), epoch=epoch, config=config) for epoch in range(4)]
    mirrored = (images[0] == split.images.flip(3)).flatten(1).all(1)
    assert 16 < int(mirrored.sum()) < 48
    assert torch.equal(images[0][~mirrored], split.images[~mirrored])
    assert torch.equal(images[1], images[0].flip(3))
    assert torch.equal(images[2], images[0])
    assert torch.equal(images[3], images[1])
    random_flips = view(split, list(range(64)), epoch=0, config=AugmentConfig(hflip=True))
    assert torch.equal(random_flips, images[0]), "the first epoch equals that of random flips"
    with pytest.raises(ValueError, match="hflip: true"):
        AugmentConfig(hflip="alternate", views="all")


def test_clone_gives_the_same_images_and_shares_the_padded_ones(split: Split) -> None:
    config = AugmentConfig(crop_padding=4, hflip=True, views=3)
    batch = gather_batch(split, ROWS, epoch=4, micro_batch=0)
    augment = Augment(config, split)
    images = augment(batch).images
    assert torch.equal(augment.clone()(batch).images, images)
    assert torch.equal(augment.clone(view_id=1)(batch).images, images)
    assert not torch.equal(augment.clone(view_id=0)(batch).images, images)
    assert augment.clone().padded_images is augment.padded_images


def test_cutout_fills_a_clipped_square_with_the_mean() -> None:
    images = torch.full((3, 3, 32, 32), 7, dtype=torch.uint8)
    holes = cutout(images, torch.tensor([16, 0, 31]), torch.tensor([16, 0, 10]), 8)
    covered = (holes != 7).all(1)
    assert covered.sum((1, 2)).tolist() == [64, 16, 5 * 8]
    assert covered[0, 12:20, 12:20].all()
    assert covered[1, :4, :4].all()
    assert covered[2, 27:, 6:14].all()
    assert holes[0, :, 16, 16].tolist() == list(MEAN_COLOR)


def test_parameters_are_uniform() -> None:
    table = draw_table(ALL, view=0, num_images=50_000, image_size=32)
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


def test_default_config_does_not_change_images(split: Split) -> None:
    assert torch.equal(view(split, list(range(64)), epoch=0, config=AugmentConfig()), split.images)


# ----------------------------------------------------------------------------- all views


@pytest.mark.parametrize(
    ("padding", "flip", "count"), [(4, True, 162), (4, False, 81), (1, True, 18)]
)
def test_view_ids_enumerate_all_crops_and_flips(padding: int, flip: bool, count: int) -> None:
    config = AugmentConfig(crop_padding=padding, hflip=flip, views="all")
    assert config.num_views == count
    tables = [
        table_for_view(config, view_id, num_images=3, image_size=32) for view_id in range(count)
    ]
    assert [view_ids(config, table).tolist() for table in tables] == [
        [view_id] * 3 for view_id in range(count)
    ]
    assert len({tuple(int(column[0]) for column in table[:3]) for table in tables}) == count


def test_without_crop_and_flip_there_is_one_view(split: Split) -> None:
    config = AugmentConfig(views="all")
    assert config.num_views == 1
    result = Augment(config, split)(gather_batch(split, torch.arange(64), epoch=5, micro_batch=0))
    assert result.view_ids.tolist() == [0] * 64


def test_view_ids_of_an_epoch_reproduce_its_images(split: Split) -> None:
    config = AugmentConfig(crop_padding=2, hflip=True, views="all")
    batch = gather_batch(split, torch.arange(64), epoch=5, micro_batch=0)
    result = Augment(config, split)(batch)
    assert len(set(result.view_ids.tolist())) > 20
    for row, view_id in enumerate(result.view_ids.tolist()):
        fixed = Augment(config, split, view_id=view_id)(batch)
        assert torch.equal(fixed.images[row], result.images[row])
    unlimited = AugmentConfig(crop_padding=2, hflip=True)
    assert torch.equal(Augment(unlimited, split)(batch).images, result.images)


def test_limited_views_are_those_of_the_first_epochs(split: Split) -> None:
    config = AugmentConfig(crop_padding=4, hflip=True, cutout=8, mixup=0.2, cutmix=1.0, views=3)
    for epoch in range(5):
        batch = gather_batch(split, torch.arange(64), epoch=epoch, micro_batch=0)
        result = Augment(config, split)(batch)
        fixed = Augment(config, split, view_id=epoch % 3)(batch)
        assert torch.equal(result.images, fixed.images)
        assert result.view_ids.tolist() == [epoch % 3] * 64


@pytest.mark.parametrize(
    "options", [{"cutout": 8}, {"mixup": 0.2}, {"cutmix": 1.0}, {"resizemix": (0.1, 0.8)}]
)
def test_all_views_refuses_cutout_and_mixing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a number of views"):
        AugmentConfig(crop_padding=4, views="all", **options)


# ----------------------------------------------------------------------------- mixing


def mixed(split: Split, config: AugmentConfig, rows: Tensor | None = None, epoch: int = 0):
    batch = gather_batch(split, torch.arange(64), epoch=epoch, micro_batch=0)
    table = draw_mix_table(
        config,
        epoch,
        num_images=64,
        image_size=32,
        partners=torch.arange(64) if rows is None else rows,
    )
    return Augment(config, split, rows)(batch), table


def test_mixup_blends_two_augmented_images(split: Split) -> None:
    """Pixels are rounded once, and the partner has the parameters of its row."""
    config = AugmentConfig(crop_padding=4, hflip=True, cutout=8, mixup=0.4)
    result, table = mixed(split, config)
    plain = view(split, list(range(64)), epoch=0)
    lam = table.lam.double()[:, None, None, None]
    expected = lam * plain + (1 - lam) * plain[table.partner]
    assert (result.images - expected).abs().max() <= 0.5 + 1e-4
    assert torch.equal(result.lam, table.lam)
    assert torch.equal(result.partner_labels, split.labels[table.partner])
    assert torch.equal(result.labels, split.labels)
    assert float(table.lam.std()) > 0.05


def test_cutmix_pastes_a_box_and_lam_is_the_share_of_kept_pixels(split: Split) -> None:
    config = AugmentConfig(crop_padding=4, hflip=True, cutmix=1.0)
    result, table = mixed(split, config)
    crop = AugmentConfig(crop_padding=4, hflip=True)
    plain = view(split, list(range(64)), epoch=0, config=crop)
    for row in range(64):
        top, bottom, left, right = table.box[row].tolist()
        expected = plain[row].clone()
        expected[:, top:bottom, left:right] = plain[table.partner[row], :, top:bottom, left:right]
        assert torch.equal(result.images[row], expected)
        kept = 1 - (bottom - top) * (right - left) / 1024
        assert float(table.lam[row]) == pytest.approx(kept)


def test_resizemix_shrinks_the_partner_into_a_box(split: Split) -> None:
    config = AugmentConfig(crop_padding=4, hflip=True, resizemix=(0.1, 0.8))
    result, table = mixed(split, config)
    plain = view(split, list(range(64)), epoch=0, config=AugmentConfig(crop_padding=4, hflip=True))
    for row in range(64):
        top, bottom, left, right = table.box[row].tolist()
        partner = plain[table.partner[row]][None].float()
        size = (bottom - top, right - left)
        expected = plain[row].clone()
        small = F.interpolate(partner, size, mode="nearest")[0]
        expected[:, top:bottom, left:right] = small.to(torch.uint8)
        assert torch.equal(result.images[row], expected), (row, size)
        assert float(table.lam[row]) == pytest.approx(1 - size[0] ** 2 / 1024)
    assert torch.equal(result.partner_labels, split.labels[table.partner])


def test_resizemix_boxes_are_squares_of_uniform_size_and_place() -> None:
    rows = torch.arange(50_000)
    config = AugmentConfig(resizemix=(0.25, 0.75), cutmix=1.0, mixup=0.2, mix_probability=0.5)
    table = draw_mix_table(config, 0, num_images=50_000, image_size=32, partners=rows)
    assert table.resized is not None
    for column in (table.resized, table.pasted & ~table.resized, ~table.pasted):
        assert float(column.double().mean()) == pytest.approx(1 / 3, abs=0.01)
    top, bottom, left, right = table.box[table.resized].unbind(1)
    side = bottom - top
    assert torch.equal(side, right - left)
    assert float((side == 0).double().mean()) == pytest.approx(0.5, abs=0.01)
    assert set(side[side > 0].tolist()) == set(range(8, 25))
    place = top[side == 16]
    assert set(place.tolist()) == set(range(17))
    assert torch.bincount(place).float().std() < 0.25 * torch.bincount(place).float().mean()
    unmixed = table.resized & (table.lam == 1)
    assert torch.equal(unmixed[table.resized], side == 0)


def test_mixing_parameters_have_the_distributions_of_the_papers() -> None:
    """Beta(0.3, 0.3) has mean 1/2 and variance 1/(4 * 1.6)."""
    rows = torch.arange(50_000)
    mixup = draw_mix_table(
        AugmentConfig(mixup=0.3), 0, num_images=50_000, image_size=32, partners=rows
    )
    assert float(mixup.lam.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(mixup.lam.var()) == pytest.approx(1 / 6.4, abs=0.005)
    assert not mixup.pasted.any()
    assert 30_000 < len(mixup.partner.unique()) < 33_000  # 1 - 1/e of them, with replacement
    config = AugmentConfig(mixup=0.3, cutmix=1.0, mix_probability=0.6)
    both = draw_mix_table(config, 0, num_images=50_000, image_size=32, partners=rows)
    assert float(both.pasted.double().mean()) == pytest.approx(0.5, abs=0.01)
    unmixed = float((both.lam == 1).double().mean())
    assert unmixed == pytest.approx(0.4, abs=0.03)  # includes a few empty boxes
    same = draw_mix_table(config, 0, num_images=50_000, image_size=32, partners=rows)
    assert all(map(torch.equal, leaves(both), leaves(same)))
    next_view = draw_mix_table(config, 1, num_images=50_000, image_size=32, partners=rows)
    assert not torch.equal(both.lam, next_view.lam)


def test_partners_are_training_rows(split: Split) -> None:
    rows = torch.tensor([3, 5, 60])
    result, table = mixed(split, AugmentConfig(mixup=1.0), rows)
    assert set(table.partner.tolist()) == {3, 5, 60}
    assert torch.equal(result.partner_labels, split.labels[table.partner])


def test_lam_of_one_changes_nothing() -> None:
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    config = AugmentConfig(mixup=1.0, cutmix=1.0, mix_probability=1e-9)
    table = draw_mix_table(config, 0, num_images=64, image_size=32, partners=torch.arange(64))
    mixed_in = mix(images, images.flip(0), table.lam, table.box, table.pasted)
    assert torch.equal(mixed_in, images)


# ----------------------------------------------------------------------------- repeated augmentation


def repeated(split: Split, config: AugmentConfig, *, world_size: int, rank: int, step: int = 0):
    return next(
        train_batches(
            split,
            torch.arange(64),
            BatchPlan(
                seed=0,
                shuffle=True,
                batch_size=12,
                micro_batches=2,
                rank=rank,
                world_size=world_size,
                repeated=config.repeated,
            ),
            start_step=step,
        )
    )


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4, "cutmix": 1.0}], ids=["plain", "mixed"])
def test_copies_of_a_row_have_the_views_of_later_epochs(
    split: Split, mixing: dict[str, float]
) -> None:
    """Copy c of epoch e is the image of epoch 3 e + c without repetition."""
    config = AugmentConfig(crop_padding=4, hflip=True, cutout=8, repeated=3, **mixing)  # type: ignore[arg-type]
    single = AugmentConfig(crop_padding=4, hflip=True, cutout=8, **mixing)  # type: ignore[arg-type]
    augment = Augment(config, split)
    for step in (0, 5, 7):  # an epoch has 5
        for batch in repeated(split, config, world_size=1, rank=0, step=step):
            assert batch.copies is not None
            assert batch.copies.tolist() == [0, 1, 2] * 2
            assert batch.rows.tolist() == [
                row for row in batch.rows[::3].tolist() for _ in range(3)
            ]
            result = augment(batch)
            assert result.view_ids.tolist() == [3 * batch.epoch + copy for copy in batch.copies]
            for index, (row, copy) in enumerate(zip(batch.rows, batch.copies, strict=True)):
                epoch = 3 * batch.epoch + int(copy)
                expected = Augment(single, split)(
                    gather_batch(split, row[None], epoch=epoch, micro_batch=0)
                )
                assert torch.equal(result.images[index], expected.images[0])
                if mixing:
                    assert result.lam is not None
                    assert expected.lam is not None
                    assert result.lam[index] == expected.lam[0]
            for one, other in ((0, 1), (1, 2), (0, 2)):
                assert not torch.equal(result.images[one], result.images[other])


def test_repetition_visits_fewer_rows_and_does_not_depend_on_the_ranks(split: Split) -> None:
    config = AugmentConfig(crop_padding=4, repeated=3)
    rows = [
        row
        for step in range(5)
        for micro_batch in repeated(split, config, world_size=1, rank=0, step=step)
        for row in micro_batch.rows.tolist()
    ]
    assert len(rows) == 60
    assert len(set(rows)) == 20
    whole = repeated(split, config, world_size=1, rank=0)
    parts = [repeated(split, config, world_size=2, rank=rank)[0] for rank in (0, 1)]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert one.copies is not None
        assert other.copies is not None
        assert torch.equal(one.copies, other.copies)


@pytest.mark.parametrize("copies", [1, 2])
def test_prefetched_tables_are_equal_and_keep_their_addresses(split: Split, copies: int) -> None:
    """CUDA graphs read the tables by address; the jump to epoch 3 is like a restart."""
    config = AugmentConfig(crop_padding=4, hflip=True, cutout=8, cutmix=1.0, repeated=copies)
    ahead, plain = Augment(config, split, prefetch=True), Augment(config, split, prefetch=False)
    addresses = set()
    for epoch in (0, 1, 3, 4):
        for augment in (ahead, plain):
            augment.prepare(epoch)
        assert plain.next_tables is None
        assert ahead.next_tables is not None
        assert ahead.next_tables[0] == config.views_in_epoch(epoch + 1)
        tables, expected = leaves(ahead.tables), leaves(plain.tables)
        assert all(map(torch.equal, tables, expected))
        addresses.add(tuple(tensor.data_ptr() for tensor in tables))
    assert len(addresses) == 1
