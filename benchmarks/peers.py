"""The ways to feed a training that ours is measured against, as their users write them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms  # type: ignore[import-untyped]

from cifar_dist.data.arrow import Split
from cifar_dist.nets.pixels import CIFAR_MEAN, CIFAR_STD

T = TypeVar("T")
MOST_ENCODED = 5_000  # rows as PNG; a row costs the same whatever their number


class TutorialDataset(Dataset[tuple[np.ndarray, np.ndarray]]):
    """The tutorial's `CIFAR100DatasetSimple(return_tensor=True)` at 32 px, item by item.

    Its resize to the same size is a copy here.
    """

    def __init__(self, split: Split) -> None:
        self.images = split.images.numpy().copy()  # uint8 [N, 3, 32, 32]
        self.labels = split.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image = np.ascontiguousarray(np.transpose(self.images[index], (1, 2, 0)))
        image = np.transpose(image, (2, 0, 1)).astype(np.float32) / 255.0
        return image, np.array(self.labels[index], dtype=np.int64)


def tutorial_loader(split: Split, batch_size: int) -> DataLoader[Any]:
    """Batches (images float32 [B, 3, 32, 32], labels int64 [B]), in this process."""
    return DataLoader(TutorialDataset(split), batch_size=batch_size, drop_last=True)


def hugging_face_loader(split: Split, batch_size: int, *, augment: bool) -> DataLoader[Any]:
    """The same from a Hugging Face dataset: an `Image()` column of PNGs and `set_transform`.

    With `augment`, torchvision's crop, flip and normalisation per item.
    """
    import datasets

    rows = min(MOST_ENCODED, len(split.labels))
    data = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": png(image), "path": None} for image in split.images[:rows]],
            "label": split.labels[:rows].tolist(),
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    transform: Callable[[Image.Image], Tensor] = transforms.ToTensor()
    if augment:
        transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(CIFAR_MEAN, CIFAR_STD),
            ]
        )

    def transformed(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"image": [transform(image) for image in rows["image"]], "label": rows["label"]}

    def collate(items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        images = torch.stack([item["image"] for item in items])
        return images, torch.tensor([item["label"] for item in items])

    data.set_transform(transformed)
    return DataLoader(data, batch_size=batch_size, drop_last=True, collate_fn=collate)


def png(image: Tensor) -> bytes:
    """uint8 [3, 32, 32] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def endless(batches: Iterable[T]) -> Iterator[T]:
    while True:
        yield from batches
