"""Images of other sizes than 32 px: stored, augmented and described."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_data import write_sized
from test_transforms import TRANSFORMS, random_columns
from torch import Tensor

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.augment.image_ops import warp
from cifar_dist.data.augment.policies import AUTO_RANGES as AUTO
from cifar_dist.data.augment.policies import OPERATIONS, encode_ops
from cifar_dist.data.augment.tables import draw_mix_table, draw_table
from cifar_dist.data.batches import Batch, gather_batch
from cifar_dist.data.dataset import Split, load_split, read_image_size
from cifar_dist.data.ingest.near_duplicates import find_near_duplicates
from cifar_dist.recipe.dry_run import describe
from cifar_dist.recipe.load import load_recipe
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker

SIZES = (8, 33, 48, 96)


def random_split(size: int, rows: int = 16) -> Split:
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (rows, 3, size, size), generator=generator).byte()
    return Split(images=images, labels=torch.arange(rows) % 4)


@pytest.mark.parametrize("size", SIZES)
def test_dataset_has_the_size_of_its_images(tmp_path: Path, size: int) -> None:
    write_sized(tmp_path, size)
    split = load_split(tmp_path, "test")
    assert read_image_size(tmp_path) == split.image_size == size
    assert split.images.shape == (23, 3, size, size)


@pytest.mark.parametrize("size", [7, 97])
def test_other_sizes_are_refused(tmp_path: Path, size: int) -> None:
    write_sized(tmp_path, size)
    with pytest.raises(UserError, match="with S from 8 to 96"):
        load_split(tmp_path, "test")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_rows_that_are_not_applied_stay_unchanged(name: str, size: int) -> None:
    split, transform = random_split(size), TRANSFORMS[name]
    column = transform.draw(random_columns(16), torch.zeros(16, dtype=torch.bool), size)
    assert torch.equal(transform(split.images, column), split.images)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("on_host", [False, True])
def test_crop_and_flip_equal_a_slice_of_the_padded_image(size: int, on_host: bool) -> None:
    split = replace(random_split(size), on_host=on_host)
    config = AugmentConfig(crop_padding=5, hflip=True)
    images = Augment(config, split)(batch_of(split)).images
    table = draw_table(config, 0, num_images=16, image_size=size)
    padded = torch.nn.functional.pad(split.images, (5, 5, 5, 5))
    for row, (y, x) in enumerate(zip(table.shift_y + 5, table.shift_x + 5, strict=True)):
        expected = padded[row, :, y : y + size, x : x + size]
        assert torch.equal(images[row], expected.flip(2) if table.flip[row] else expected)


def batch_of(split: Split) -> Batch:
    return gather_batch(split, torch.arange(len(split.labels)), epoch=0, micro_batch=0)


@pytest.mark.parametrize("size", SIZES)
def test_all_transforms_together_keep_the_size(size: int) -> None:
    split = random_split(size)
    config = AugmentConfig(
        crop_padding=4, hflip=True, vflip=True, cutout=4, cutmix=1.0, mixup=0.2, **TRANSFORMS
    )
    images = Augment(config, split)(batch_of(split)).images
    assert images.shape == split.images.shape
    assert len({image.numpy().tobytes() for image in images}) == 16


@pytest.mark.parametrize("size", SIZES)
def test_whole_pixel_shifts_are_exact(size: int) -> None:
    images = random_split(size).images
    matrix = torch.tensor([[1.0, 0, 3, 0, 1, -2]]).expand(16, 6)
    for interpolation in ("nearest", "bilinear"):
        moved = warp(images, matrix, interpolation)
        assert torch.equal(moved[:, :, 2:, :-3], images[:, :, :-2, 3:])
        assert not moved[:, :, :2].any()
        assert not moved[..., -3:].any()


def test_strength_of_geometric_operations_follows_the_size() -> None:
    def translation(size: int) -> Tensor:
        operation = torch.tensor([OPERATIONS.index("translate_x")])
        column = encode_ops(AUTO, operation, torch.tensor([30]), torch.tensor([1]), image_size=size)
        return column[0, 2]

    assert [translation(size).item() for size in (32, 64, 96)] == [-14, -29, -43]  # 150/331 of it


@pytest.mark.parametrize("size", SIZES)
def test_share_of_cutmix_is_the_kept_area(size: int) -> None:
    rows = torch.arange(4000)
    table = draw_mix_table(
        AugmentConfig(cutmix=1.0), 0, num_images=4000, image_size=size, partners=rows
    )
    top, bottom, left, right = table.box.unbind(1)
    area = (bottom - top) * (right - left)
    assert torch.equal(table.lam, (1 - area.double() / size**2).float())
    assert 0 < table.box.max() <= size
    assert abs(table.lam.mean() - 0.6) < 0.1


def test_holes_are_uniform_over_the_image() -> None:
    table = draw_table(AugmentConfig(cutout=8), 0, num_images=20_000, image_size=48)
    counts = torch.bincount(table.hole_x, minlength=48)
    assert len(counts) == 48
    assert counts.min() > 300


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AugmentConfig(crop_padding=8), r"augment\.crop_padding=8: must be below the size"),
        (AugmentConfig(cutout=20), r"augment\.cutout=20: covers every image of 8 px"),
    ],
)
def test_padding_and_holes_that_exceed_the_image_are_refused(
    config: AugmentConfig, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Augment(config, random_split(8))
    Augment(config, random_split(33))


def test_dry_run_counts_the_bytes_and_checks_the_augmentation(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    plans = {}
    for size in (16, 48):
        write_sized(tmp_path / str(size), size)
        path = recipe(
            data={"path": str(tmp_path / str(size))}, augment={"crop_padding": 4, "hflip": False}
        )
        plans[size] = describe(load_recipe(path)).data_bytes
    assert plans == {size: 64 * (3 * size**2 + 20) + 64 * 3 * (size + 8) ** 2 for size in (16, 48)}
    path = recipe(data={"path": str(tmp_path / "16")}, augment={"crop_padding": 16})
    with pytest.raises(UserError, match="crop_padding=16"):
        describe(load_recipe(path))


def test_near_duplicates_are_found_at_any_size() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(12, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)
    train = (255 * smooth).byte()
    test = torch.stack([train[3].flip(2), train[7] // 2 + 60, 255 - train[1]])
    assert find_near_duplicates(train, test) == [[0, 3], [1, 7]]
