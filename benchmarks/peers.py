"""Data loaders of other libraries, as their users write them.

All use `num_workers=0`, so each side has one core.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms  # type: ignore[import-untyped]

from cifar_dist.data.dataset import Split
from cifar_dist.models.preprocess import CIFAR_MEAN, CIFAR_STD

T = TypeVar("T")
Batches = Iterator[tuple[Tensor, Tensor]]  # (images float32 [B, 3, S, S], labels int64 [B])
MAX_ENCODED = 5_000  # rows encoded as PNG; the cost per row does not depend on their number


class TutorialDataset(Dataset[tuple[np.ndarray, np.ndarray]]):
    """The tutorial's `CIFAR100DatasetSimple(return_tensor=True)`, whose resize to 32 px is a copy.

    With `augment`, its `CIFAR100AugDataset`: one of five albumentations transforms per image.
    """

    def __init__(self, split: Split, *, image_size: int = 32, augment: bool = False) -> None:
        self.images = split.images.cpu().numpy().copy()  # uint8 [N, 3, 32, 32]
        self.labels = split.labels.tolist()
        self.image_size = image_size
        self.augment = tutorial_augment() if augment else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image = np.ascontiguousarray(np.transpose(self.images[index], (1, 2, 0)))
        if self.image_size != 32:
            import cv2

            image = cv2.resize(image, (self.image_size, self.image_size))
        if self.augment:
            image = self.augment(image=image)["image"]
        image = np.transpose(image, (2, 0, 1)).astype(np.float32) / 255.0
        return image, np.array(self.labels[index], dtype=np.int64)


def tutorial_augment() -> Callable[..., dict[str, Any]]:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # no version check over the network
    import albumentations

    choices = [
        albumentations.ShiftScaleRotate(),
        albumentations.CoarseDropout(),
        albumentations.ColorJitter(),
        albumentations.HorizontalFlip(),
        albumentations.VerticalFlip(),
    ]
    return albumentations.OneOf(choices, p=1.0)


class PillowDataset(Dataset[tuple[Any, Any]]):
    """PIL images and a transform, as `torchvision.datasets.CIFAR100`."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Any] | None = None) -> None:
        self.images = split.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.labels = split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = Image.fromarray(self.images[index])
        return self.transform(image) if self.transform else image, self.labels[index]


CROP_FLIP_TRANSFORM = transforms.Compose(
    [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(CIFAR_MEAN, CIFAR_STD),
    ]
)


def tutorial_loader(
    split: Split, batch_size: int, *, image_size: int = 32, augment: bool = False
) -> DataLoader[Any]:
    dataset = TutorialDataset(split, image_size=image_size, augment=augment)
    return DataLoader(dataset, batch_size=batch_size, drop_last=True)


def torchvision_loader(split: Split, batch_size: int) -> DataLoader[Any]:
    """Crop, flip and normalize PIL images with torchvision."""
    dataset = PillowDataset(split, CROP_FLIP_TRANSFORM)
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True)


def timm_loader(
    split: Split, batch_size: int, device: torch.device, *, image_size: int = 32, augment: bool
) -> Iterable[tuple[Tensor, Tensor]]:
    """Return timm's loader with the defaults of its train.py, or with `--no-aug`."""
    from timm.data import create_loader

    return create_loader(
        PillowDataset(split),
        input_size=(3, image_size, image_size),
        batch_size=batch_size,
        is_training=True,
        no_aug=not augment,
        interpolation="random" if augment else "bilinear",
        num_workers=0,
        device=device,
    )


def hugging_face_loader(split: Split, batch_size: int, *, augment: bool) -> DataLoader[Any]:
    """Return a Hugging Face dataset with an `Image()` column of PNGs and `set_transform`.

    `augment` adds torchvision's crop, flip and normalization per item.
    """
    import datasets

    rows = min(MAX_ENCODED, len(split.labels))
    data = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": png(image), "path": None} for image in split.images[:rows].cpu()],
            "label": split.labels[:rows].tolist(),
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    transform: Callable[[Image.Image], Tensor] = transforms.ToTensor()
    if augment:
        transform = CROP_FLIP_TRANSFORM

    def transformed(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"image": [transform(image) for image in rows["image"]], "label": rows["label"]}

    def collate(items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        images = torch.stack([item["image"] for item in items])
        return images, torch.tensor([item["label"] for item in items])

    data.set_transform(transformed)
    return DataLoader(data, batch_size=batch_size, drop_last=True, collate_fn=collate)


def png(image: Tensor) -> bytes:
    """Encode an image (uint8 [3, 32, 32]) as PNG."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def tensor_batches(split: Split, batch_size: int, *, image_size: int = 32) -> Batches:
    """Yield batches of one tensor on the device, shuffled by index: the fastest peer.

    Batches are normalized and, if needed, resized on the device. No augmentation.
    """
    device = split.labels.device
    mean = torch.tensor(CIFAR_MEAN, device=device)[:, None, None]
    std = torch.tensor(CIFAR_STD, device=device)[:, None, None]
    while True:
        order = torch.randperm(len(split.labels), device=device)
        for rows in order.split(batch_size):
            if len(rows) == batch_size:
                images = split.images[rows].float().div_(255).sub_(mean).div_(std)
                if image_size != 32:
                    size = (image_size, image_size)
                    images = torch.nn.functional.interpolate(images, size, mode="bilinear")
                yield images, split.labels[rows]


def endless(batches: Iterable[T]) -> Iterator[T]:
    while True:
        yield from batches
