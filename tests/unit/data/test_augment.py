"""A picture is a function of (augment.seed, view, row); the ops equal the plain way to write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.augment.image_ops import MEAN_COLOR, cutout, mix
from cifar_dist.data.augment.tables import draw_mix_table, draw_table, table_for_view, view_ids
from cifar_dist.data.batches import gather_batch, train_batches
from cifar_dist.data.dataset import Split, load_split

ALL = AugmentConfig(crop_padding=4, hflip=True, cutout=8)
CPU = torch.device("cpu")
ROWS = torch.arange(64)


@pytest.fixture
def split(data: Path) -> Split:
    return load_split(data, "train")


def view(split: Split, rows: list[int], *, epoch: int, config: AugmentConfig = ALL) -> Tensor:
    batch = gather_batch(split, torch.tensor(rows), epoch=epoch, micro_batch=0)
    return Augment(config, split)(batch).images


def test_a_picture_does_not_depend_on_its_batch(split: Split) -> None:
    together = view(split, list(range(64)), epoch=3)
    alone = torch.cat([view(split, [row], epoch=3) for row in range(64)])
    shuffled = torch.randperm(64, generator=torch.manual_seed(0))
    assert torch.equal(together, alone)
    assert torch.equal(together[shuffled], view(split, shuffled.tolist(), epoch=3))


def test_views_differ_and_come_back(split: Split) -> None:
    rows = list(range(64))
    assert not torch.equal(view(split, rows, epoch=0), view(split, rows, epoch=1))
    two = AugmentConfig(crop_padding=4, hflip=True, views=2)
    assert torch.equal(
        view(split, rows, epoch=1, config=two), view(split, rows, epoch=5, config=two)
    )
    other = AugmentConfig(crop_padding=4, hflip=True, cutout=8, seed=1)
    assert not torch.equal(view(split, rows, epoch=0), view(split, rows, epoch=0, config=other))


def test_columns_do_not_move_each_other() -> None:
    """Another padding leaves flips and holes as they were: each column has its own key."""
    small = draw_table(AugmentConfig(hflip=True, crop_padding=2), view=0, num_images=500)
    large = draw_table(AugmentConfig(hflip=True, crop_padding=4), view=0, num_images=500)
    assert torch.equal(small.flip, large.flip)
    assert torch.equal(small.hole_y, large.hole_y)
    assert not torch.equal(small.shift_y, large.shift_y)


def test_the_picture_is_turned_upside_down_after_the_crop(split: Split) -> None:
    once = view(split, list(range(64)), epoch=0, config=AugmentConfig(crop_padding=4, hflip=True))
    config = AugmentConfig(crop_padding=4, hflip=True, vflip=True)
    both = view(split, list(range(64)), epoch=0, config=config)
    turned = draw_table(config, view=0, num_images=64).vflip
    assert 10 < turned.sum() < 54
    assert torch.equal(both[~turned], once[~turned])
    assert torch.equal(both[turned], once[turned].flip(2))


def test_alternating_flips_show_both_sides_in_two_epochs(split: Split) -> None:
    config = AugmentConfig(hflip="alternate")
    shown = [view(split, list(range(64)), epoch=epoch, config=config) for epoch in range(4)]
    mirrored = (shown[0] == split.images.flip(3)).flatten(1).all(1)
    assert 16 < int(mirrored.sum()) < 48
    assert torch.equal(shown[0][~mirrored], split.images[~mirrored])
    assert torch.equal(shown[1], shown[0].flip(3))
    assert torch.equal(shown[2], shown[0])
    assert torch.equal(shown[3], shown[1])
    by_lot = view(split, list(range(64)), epoch=0, config=AugmentConfig(hflip=True))
    assert torch.equal(by_lot, shown[0]), "the first epoch's lot is that of plain flips"
    with pytest.raises(ValueError, match="flip: true"):
        AugmentConfig(hflip="alternate", views="all")


def test_another_augment_over_the_same_canvas_shows_the_same(split: Split) -> None:
    config, batch = (
        AugmentConfig(crop_padding=4, hflip=True, views=3),
        gather_batch(split, ROWS, epoch=4, micro_batch=0),
    )
    augment = Augment(config, split)
    shown = augment(batch).images
    assert torch.equal(augment.clone()(batch).images, shown)
    assert torch.equal(augment.clone(number=1)(batch).images, shown)
    assert not torch.equal(augment.clone(number=0)(batch).images, shown)
    assert augment.clone().padded_images is augment.padded_images


def test_cutout_covers_a_clipped_square_with_the_mean() -> None:
    images = torch.full((3, 3, 32, 32), 7, dtype=torch.uint8)
    holes = cutout(images, torch.tensor([16, 0, 31]), torch.tensor([16, 0, 10]), 8)
    covered = (holes != 7).all(1)
    assert covered.sum((1, 2)).tolist() == [64, 16, 5 * 8]
    assert covered[0, 12:20, 12:20].all()
    assert covered[1, :4, :4].all()
    assert covered[2, 27:, 6:14].all()
    assert holes[0, :, 16, 16].tolist() == list(MEAN_COLOR)


def test_draws_are_uniform() -> None:
    table = draw_table(ALL, view=0, num_images=50_000)
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


# ----------------------------------------------------------------------------- all views


@pytest.mark.parametrize(
    ("padding", "flip", "count"), [(4, True, 162), (4, False, 81), (1, True, 18)]
)
def test_all_views_are_numbered(padding: int, flip: bool, count: int) -> None:
    config = AugmentConfig(crop_padding=padding, hflip=flip, views="all")
    assert config.num_views == count
    tables = [table_for_view(config, number, num_images=3) for number in range(count)]
    assert [view_ids(config, table).tolist() for table in tables] == [
        [number] * 3 for number in range(count)
    ]
    assert len({tuple(int(column[0]) for column in table[:3]) for table in tables}) == count


def test_a_picture_without_crop_and_flip_has_one_view(split: Split) -> None:
    config = AugmentConfig(views="all")
    assert config.num_views == 1
    shown = Augment(config, split)(gather_batch(split, torch.arange(64), epoch=5, micro_batch=0))
    assert shown.view_ids.tolist() == [0] * 64


def test_an_epochs_pictures_are_those_of_their_numbers(split: Split) -> None:
    config = AugmentConfig(crop_padding=2, hflip=True, views="all")
    batch = gather_batch(split, torch.arange(64), epoch=5, micro_batch=0)
    shown = Augment(config, split)(batch)
    assert len(set(shown.view_ids.tolist())) > 20
    for row, number in enumerate(shown.view_ids.tolist()):
        numbered = Augment(config, split, number=number)(batch)
        assert torch.equal(numbered.images[row], shown.images[row])
    drawn = AugmentConfig(crop_padding=2, hflip=True)
    assert torch.equal(Augment(drawn, split)(batch).images, shown.images)


def test_a_number_of_views_is_the_views_of_the_first_epochs(split: Split) -> None:
    config = AugmentConfig(crop_padding=4, hflip=True, cutout=8, mixup=0.2, cutmix=1.0, views=3)
    for epoch in range(5):
        batch = gather_batch(split, torch.arange(64), epoch=epoch, micro_batch=0)
        shown = Augment(config, split)(batch)
        numbered = Augment(config, split, number=epoch % 3)(batch)
        assert torch.equal(shown.images, numbered.images)
        assert shown.view_ids.tolist() == [epoch % 3] * 64


@pytest.mark.parametrize("also", [{"cutout": 8}, {"mixup": 0.2}, {"cutmix": 1.0}])
def test_all_views_of_a_hole_cannot_be_counted(also: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a number of views"):
        AugmentConfig(crop_padding=4, views="all", **also)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------- mixing


def mixed(split: Split, config: AugmentConfig, rows: Tensor | None = None, epoch: int = 0):
    batch = gather_batch(split, torch.arange(64), epoch=epoch, micro_batch=0)
    table = draw_mix_table(
        config, epoch, num_images=64, partners=torch.arange(64) if rows is None else rows
    )
    return Augment(config, split, rows)(batch), table


def test_mixup_is_the_sum_of_two_views(split: Split) -> None:
    """In pixels rounded once; the partner is under its own row of the table."""
    config = AugmentConfig(crop_padding=4, hflip=True, cutout=8, mixup=0.4)
    shown, table = mixed(split, config)
    plain = view(split, list(range(64)), epoch=0)
    share = table.lam.double()[:, None, None, None]
    expected = share * plain + (1 - share) * plain[table.partner]
    assert (shown.images - expected).abs().max() <= 0.5 + 1e-4
    assert torch.equal(shown.lam, table.lam)
    assert torch.equal(shown.partner_labels, split.labels[table.partner])
    assert torch.equal(shown.labels, split.labels)
    assert float(table.lam.std()) > 0.05


def test_cutmix_pastes_a_box_and_counts_its_pixels(split: Split) -> None:
    config = AugmentConfig(crop_padding=4, hflip=True, cutmix=1.0)
    shown, table = mixed(split, config)
    crop = AugmentConfig(crop_padding=4, hflip=True)
    plain = view(split, list(range(64)), epoch=0, config=crop)
    for row in range(64):
        top, bottom, left, right = table.box[row].tolist()
        expected = plain[row].clone()
        expected[:, top:bottom, left:right] = plain[table.partner[row], :, top:bottom, left:right]
        assert torch.equal(shown.images[row], expected)
        kept = 1 - (bottom - top) * (right - left) / 1024
        assert float(table.lam[row]) == pytest.approx(kept)


def test_mixing_is_drawn_as_its_papers_say() -> None:
    """Shares of 50,000 rows: Beta(0.3, 0.3) has mean 1/2 and variance 1/(4 * 1.6)."""
    rows = torch.arange(50_000)
    blend = draw_mix_table(AugmentConfig(mixup=0.3), 0, num_images=50_000, partners=rows)
    assert float(blend.lam.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(blend.lam.var()) == pytest.approx(1 / 6.4, abs=0.005)
    assert not blend.pasted.any()
    assert 30_000 < len(blend.partner.unique()) < 33_000  # 1 - 1/e of them, drawn with replacement
    both = AugmentConfig(mixup=0.3, cutmix=1.0, mix_probability=0.6)
    either = draw_mix_table(both, 0, num_images=50_000, partners=rows)
    assert float(either.pasted.double().mean()) == pytest.approx(0.5, abs=0.01)
    alone = float((either.lam == 1).double().mean())
    assert alone == pytest.approx(0.4, abs=0.03)  # and a few boxes without a pixel
    again = draw_mix_table(both, 0, num_images=50_000, partners=rows)
    assert all(torch.equal(one, other) for one, other in zip(either, again, strict=True))
    later = draw_mix_table(both, 1, num_images=50_000, partners=rows)
    assert not torch.equal(either.lam, later.lam)


def test_partners_are_rows_that_are_trained_on(split: Split) -> None:
    trained = torch.tensor([3, 5, 60])
    shown, table = mixed(split, AugmentConfig(mixup=1.0), trained)
    assert set(table.partner.tolist()) == {3, 5, 60}
    assert torch.equal(shown.partner_labels, split.labels[table.partner])


def test_a_share_of_one_changes_nothing() -> None:
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    config = AugmentConfig(mixup=1.0, cutmix=1.0, mix_probability=1e-9)
    table = draw_mix_table(config, 0, num_images=64, partners=torch.arange(64))
    mixed_in = mix(images, images.flip(0), table.lam, table.box, table.pasted)
    assert torch.equal(mixed_in, images)


# ----------------------------------------------------------------------------- repeated augmentation


def repeated(split: Split, config: AugmentConfig, *, world_size: int, rank: int, step: int = 0):
    return next(
        train_batches(
            split,
            torch.arange(64),
            seed=0,
            shuffle=True,
            batch_size=12,
            micro_batches=2,
            start_step=step,
            rank=rank,
            world_size=world_size,
            repeated=config.repeated,
        )
    )


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4, "cutmix": 1.0}], ids=["plain", "mixed"])
def test_copies_of_a_row_are_views_like_any_other(split: Split, mixing: dict[str, float]) -> None:
    """Copy c of epoch e is what epoch 3 e + c would show without repeats."""
    config = AugmentConfig(crop_padding=4, hflip=True, cutout=8, repeated=3, **mixing)  # type: ignore[arg-type]
    once = AugmentConfig(crop_padding=4, hflip=True, cutout=8, **mixing)  # type: ignore[arg-type]
    augment = Augment(config, split)
    for step in (0, 5, 7):  # an epoch has 5
        for batch in repeated(split, config, world_size=1, rank=0, step=step):
            assert batch.copies is not None
            assert batch.copies.tolist() == [0, 1, 2] * 2
            assert batch.rows.tolist() == [
                row for row in batch.rows[::3].tolist() for _ in range(3)
            ]
            shown = augment(batch)
            assert shown.view_ids.tolist() == [3 * batch.epoch + copy for copy in batch.copies]
            for place, (row, copy) in enumerate(zip(batch.rows, batch.copies, strict=True)):
                epoch = 3 * batch.epoch + int(copy)
                alone = Augment(once, split)(
                    gather_batch(split, row[None], epoch=epoch, micro_batch=0)
                )
                assert torch.equal(shown.images[place], alone.images[0])
                if mixing:
                    assert shown.lam is not None
                    assert alone.lam is not None
                    assert shown.lam[place] == alone.lam[0]
            for one, other in ((0, 1), (1, 2), (0, 2)):
                assert not torch.equal(shown.images[one], shown.images[other])


def test_an_epoch_with_repeats_shows_a_part_of_the_rows_on_any_number_of_ranks(
    split: Split,
) -> None:
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


@pytest.mark.parametrize("repeats", [1, 2])
def test_tables_drawn_ahead_are_the_same_and_stay_at_their_addresses(
    split: Split, repeats: int
) -> None:
    """CUDA graphs read the tables by address; epoch 3 comes out of turn, as after a restart."""
    config = AugmentConfig(crop_padding=4, hflip=True, cutout=8, cutmix=1.0, repeated=repeats)
    ahead, plain = Augment(config, split, prefetch=True), Augment(config, split, prefetch=False)
    addresses = set()
    for epoch in (0, 1, 3, 4):
        for augment in (ahead, plain):
            augment.prepare(epoch)
        assert plain.drawing is None
        assert ahead.drawing is not None
        assert ahead.drawing[0] == config.views_in_epoch(epoch + 1)
        found, wanted = tree_leaves(ahead.tables), tree_leaves(plain.tables)
        assert all(map(torch.equal, found, wanted))
        addresses.add(tuple(tensor.data_ptr() for tensor in found))
    assert len(addresses) == 1
