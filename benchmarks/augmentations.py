"""Draw a grid of synthetic images, one row per augmentation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.augment.policies import (
    MAGNITUDES,
    OPERATIONS,
    WIDE_RANGES,
    AutoAugment,
    RandAugment,
    TrivialAugment,
    apply_operation,
    encode_ops,
)
from cifar_dist.data.augment.transforms import Affine, ColorJitter, Erasing, OneOf
from cifar_dist.data.batches import gather_batch
from cifar_dist.data.dataset import Split
from cifar_dist.data.ingest.synthetic import draw_synthetic
from cifar_dist.utils.errors import run_command

COLUMNS, SCALE, GAP, LABEL = 12, 2, 4, 190  # images per row; zoom; pixels

AUGMENTATIONS = {
    "none": AugmentConfig(),
    "crop and flip": AugmentConfig(crop_padding=4, hflip=True),
    "vertical flip": AugmentConfig(vflip=True),
    "affine": AugmentConfig(affine=Affine(degrees=15, translate=0.1, scale=(0.8, 1.2))),
    "color_jitter": AugmentConfig(
        color_jitter=ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    ),
    "auto_augment": AugmentConfig(auto_augment=AutoAugment()),
    "rand_augment": AugmentConfig(rand_augment=RandAugment()),
    "trivial_augment": AugmentConfig(trivial_augment=TrivialAugment()),
    "erasing": AugmentConfig(erasing=Erasing()),
    "erasing, mean": AugmentConfig(erasing=Erasing(fill="mean")),
    "one_of": AugmentConfig(
        one_of=OneOf(
            affine=Affine(degrees=15),
            color_jitter=ColorJitter(brightness=0.4, hue=0.1),
            erasing=Erasing(),
        )
    ),
    "cutout": AugmentConfig(cutout=8),
    "mixup": AugmentConfig(mixup=1.0),
    "cutmix": AugmentConfig(cutmix=1.0),
    "resizemix": AugmentConfig(resizemix=(0.1, 0.8)),
}


def operation_rows(images: Tensor) -> dict[str, Tensor]:
    """Apply each policy operation with magnitudes from 0 to the maximum of TrivialAugment Wide."""
    magnitude = torch.linspace(0, MAGNITUDES, len(images)).round()
    sign = torch.where(torch.arange(len(images)) % 2 == 0, 1, -1)
    return {
        f"- {name}": apply_operation(
            images,
            encode_ops(WIDE_RANGES, torch.full_like(sign, number), magnitude, sign, image_size=32),
        )
        for number, name in enumerate(OPERATIONS)
    }


def draw_grid(rows: dict[str, Tensor]) -> Image.Image:
    """Draw rows of enlarged images (uint8 [COLUMNS, 3, 32, 32] each), labeled with their names."""
    step = 32 * SCALE + GAP
    sheet = Image.new("RGB", (LABEL + COLUMNS * step, len(rows) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        pen.text((8, row * step + step // 2 - 8), name, fill="black", font_size=16)
        for column, image in enumerate(images):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy())
            tile = tile.resize((32 * SCALE, 32 * SCALE), Image.Resampling.NEAREST)
            sheet.paste(tile, (LABEL + column * step, row * step))
    return sheet


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/augmentations.py",
        description="Draw synthetic images under each augmentation, one row per augmentation.",
    )
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    parser.add_argument(
        "--epoch", type=int, default=0, help="epoch whose random parameters are used"
    )
    options = parser.parse_args(arguments)
    drawn, _, _ = draw_synthetic(train_per_class=1, test_per_class=1)
    split = Split(
        images=torch.from_numpy(drawn.images).view(-1, 3, 32, 32),
        labels=torch.from_numpy(drawn.fine_labels),
    )
    batch = gather_batch(split, torch.arange(COLUMNS), epoch=options.epoch, micro_batch=0)
    rows = {name: Augment(config, split)(batch).images for name, config in AUGMENTATIONS.items()}
    draw_grid(rows | operation_rows(batch.images)).save(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
