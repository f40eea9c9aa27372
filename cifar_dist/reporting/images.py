"""Turn tensors into PNG images that are embedded in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.batches import gather_batch
from cifar_dist.data.dataset import Split
from cifar_dist.evaluation.scores import confusion

GAP = 2  # pixels between the images of a grid


def png(image: Tensor) -> bytes:
    """Encode uint8 [3, H, W] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, "PNG", optimize=True)
    return file.getvalue()


def data_uri(image: Tensor) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def image_grid(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return rows of uint8 [3, S, S] images as one image with white gaps."""
    side, columns = rows[0][0].shape[1] + GAP, max(len(row) for row in rows)
    canvas = torch.full((3, len(rows) * side - GAP, columns * side - GAP), 255, dtype=torch.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            canvas[:, i * side : (i + 1) * side - GAP, j * side : (j + 1) * side - GAP] = image
    return canvas


def augmented_views(
    config: AugmentConfig, split: Split, rows: Tensor, *, num_images: int = 8, epochs: int = 11
) -> Tensor:
    """Return a grid of the first of `rows` (int64), unchanged and augmented as in the first epochs."""
    chosen = rows[:num_images]
    augment = Augment(config, split, rows)
    views = []
    for epoch in range(epochs):
        copies = torch.zeros(len(chosen), dtype=torch.int64) if config.repeated > 1 else None
        batch = gather_batch(split, chosen, epoch=epoch, micro_batch=0, copies=copies)
        views.append(augment(batch).images)
    plain = split.images[chosen]
    return image_grid([[plain[i], *(view[i] for view in views)] for i in range(len(chosen))])


@dataclass(frozen=True, kw_only=True)
class Mistake:
    row: int
    truth: str
    predicted: str
    confidence: float  # percent
    image: str  # a data URI


def confident_mistakes(
    logits: Tensor, labels: Tensor, images: Tensor, names: Sequence[str], count: int = 24
) -> list[Mistake]:
    """Return the wrong predictions with the highest probability, in descending order."""
    confidence, predicted = logits.double().softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:count]
    return [
        Mistake(
            row=row,
            truth=names[int(labels[row])],
            predicted=names[int(predicted[row])],
            confidence=100 * float(confidence[row]),
            image=data_uri(images[row]),
        )
        for row in worst.tolist()
    ]


def frequent_confusions(
    logits: Tensor, labels: Tensor, names: Sequence[str], count: int = 12
) -> list[tuple[str, str, int]]:
    """Return (true class, predicted class, count), the most frequent first."""
    table = confusion(labels, logits.argmax(1), logits.shape[1]).fill_diagonal_(0)
    largest = table.flatten().argsort(descending=True, stable=True)[:count].tolist()
    pairs = [divmod(index, len(table)) for index in largest]
    return [(names[i], names[j], int(table[i, j])) for i, j in pairs if table[i, j]]
