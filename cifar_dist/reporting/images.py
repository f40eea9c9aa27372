"""Turn images into small files that are embedded in the page."""

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

QUALITY = 80  # of WebP: 420 bytes for 32 x 32 pixels, instead of the 2,300 of a PNG file


def png(image: Tensor) -> bytes:
    """Encode uint8 [3, H, W] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, "PNG", optimize=True)
    return file.getvalue()


def data_uri(image: Tensor) -> str:
    """Encode uint8 [3, H, W] as a WebP data URI."""
    file = io.BytesIO()
    pixels = image.permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(file, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def augmented_views(
    config: AugmentConfig, split: Split, rows: Tensor, *, num_images: int, epochs: int
) -> list[list[str]]:
    """Return the first of `rows` (int64) as data URIs: unchanged, then as in the first epochs."""
    chosen = rows[:num_images]
    augment = Augment(config, split, rows)
    views = [split.images[chosen]]
    for epoch in range(epochs):
        copies = torch.zeros(len(chosen), dtype=torch.int64) if config.repeated > 1 else None
        batch = gather_batch(split, chosen, epoch=epoch, micro_batch=0, copies=copies)
        views.append(augment(batch).images)
    return [[data_uri(view[index]) for view in views] for index in range(len(chosen))]


@dataclass(frozen=True, kw_only=True)
class Mistake:
    row: int
    truth: str
    predicted: str
    confidence: float  # percent
    image: str  # a data URI


def confident_mistakes(
    logits: Tensor, labels: Tensor, images: Tensor, names: Sequence[str], *, count: int
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


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """Images of one class that are predicted as another one."""

    truth: str
    predicted: str
    count: int
    of: int  # images of the true class
    same_superclass: bool
    images: list[str]  # data URIs of the most confident examples


def confused_pairs(
    logits: Tensor,
    labels: Tensor,
    images: Tensor,
    names: Sequence[str],
    superclass_of: Tensor,
    *,
    count: int,
    examples: int,
) -> list[ConfusedPair]:
    """Return the most frequent pairs of true and predicted class; `superclass_of` is int64 [C].

    -1 stands for a class without superclass.
    """
    confidence, predicted = logits.softmax(1).max(1)
    wrong = confusion(labels, predicted, logits.shape[1]).fill_diagonal_(0)
    largest = wrong.flatten().argsort(descending=True, stable=True)[:count].tolist()
    pairs = []
    for truth, other in (divmod(index, len(wrong)) for index in largest):
        if not wrong[truth, other]:
            break  # in descending order
        rows = ((labels == truth) & (predicted == other)).nonzero().flatten()
        shown = rows[confidence[rows].argsort(descending=True, stable=True)][:examples]
        pairs.append(
            ConfusedPair(
                truth=names[truth],
                predicted=names[other],
                count=int(wrong[truth, other]),
                of=int((labels == truth).sum()),
                same_superclass=bool(superclass_of[truth] == superclass_of[other] >= 0),
                images=[data_uri(images[row]) for row in shown.tolist()],
            )
        )
    return pairs
