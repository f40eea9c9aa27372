"""Classify image files or rows of a data set, and present the predictions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cifar_dist.data.dataset import Labels, load_split
from cifar_dist.data.image_files import SUFFIXES, files_in, read_image
from cifar_dist.inference.trained_model import TrainedModel
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log

TOP = 5


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    label: str
    superclass: str  # "" if unknown or without superclasses
    probability: float  # 0 to 1


@dataclass(frozen=True, kw_only=True)
class Prediction:
    image: str  # a path, or test:7
    scores: list[ClassScore]  # most likely first
    truth: str | None  # known for rows of a split


def find_images(paths: Sequence[Path], size: int) -> dict[str, Tensor]:
    """Return the images of files and folders by path, uint8 [3, size, size].

    `size` is that of the images that the model was trained on, whatever size it enlarges them to.
    Unreadable files in folders are skipped.
    """
    images: dict[str, Tensor] = {}
    for path in paths:
        if not path.is_dir():
            images[str(path)] = torch.from_numpy(read_image(path, size))
            continue
        for file in sorted(files_in(path)):
            if file.suffix.lower() not in SUFFIXES:
                continue
            try:
                images[str(file)] = torch.from_numpy(read_image(file, size))
            except UserError as error:
                log.warning(f"skipped: {error}")
    if not images:
        raise UserError("no readable image in these folders; give other folders, or files")
    return images


def read_rows(
    rows: str, data: Path, names: Sequence[str], labels: Labels
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the images and true classes of `rows`: test:0-99, train:5 or test."""
    match = re.fullmatch(r"(train|test)(?::(\d+)(?:-(\d+))?)?", rows)
    if match is None:
        raise UserError(f"--rows {rows}: write test:0-99, train:5 or test")
    name = cast(Literal["train", "test"], match[1])
    split = load_split(data, name, labels=labels)
    first = int(match[2] or 0)
    last = int(match[3] or match[2] or len(split.labels) - 1)
    if not first <= last < len(split.labels):
        raise UserError(f"--rows {rows}: {name} has rows 0 to {len(split.labels) - 1}")
    images = {f"{name}:{row}": split.images[row] for row in range(first, last + 1)}
    return images, [names[int(label)] for label in split.labels[first : last + 1]]


def predict(
    model: TrainedModel, images: dict[str, Tensor], truths: Sequence[str] | None = None
) -> list[Prediction]:
    """Return the five most likely classes of uint8 [3, S, S] images."""
    logits = model.logits(torch.stack(list(images.values())))
    top = model.probabilities(logits).topk(min(TOP, len(model.fine)), dim=1)
    return [
        Prediction(
            image=name,
            scores=[
                ClassScore(
                    label=model.fine[index],
                    superclass=model.superclass[index],
                    probability=probability,
                )
                for probability, index in zip(probabilities, indices, strict=True)
            ],
            truth=truths[row] if truths else None,
        )
        for row, (name, probabilities, indices) in enumerate(
            zip(images, top.values.tolist(), top.indices.tolist(), strict=True)
        )
    ]


def to_json(prediction: Prediction) -> dict[str, Any]:
    """Return the fields, without a superclass where there is none."""
    fields = asdict(prediction)
    for score in fields["scores"]:
        if not score["superclass"]:
            del score["superclass"]
    return fields


def format_predictions(predictions: Sequence[Prediction]) -> str:
    """Return text for the terminal, one line per image."""
    width = min(40, max(len(prediction.image) for prediction in predictions))
    lines = []
    for prediction in predictions:
        best, *others = prediction.scores
        mark = ""
        if prediction.truth is not None:
            mark = "  correct" if prediction.truth == best.label else f"  is {prediction.truth}"
        superclass = f" ({best.superclass})" if best.superclass else ""
        rest = ", ".join(f"{score.label} {100 * score.probability:.0f}" for score in others)
        lines.append(
            f"{prediction.image[-width:]:<{width}}  {100 * best.probability:5.1f} %  {best.label}"
            f"{superclass}{mark}  [{rest}]"
        )
    return "\n".join(lines)


def draw_predictions(images: Sequence[Tensor], predictions: Sequence[Prediction]) -> Tensor:
    """Return one image, uint8 [3, H, W], with the inputs above their three best classes."""
    side, text_height, columns = 160, 52, 6
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (side + 8), rows * (side + text_height)), "white")
    pen = ImageDraw.Draw(page)
    for index, (image, prediction) in enumerate(zip(images, predictions, strict=True)):
        x, y = index % columns * (side + 8), index // columns * (side + text_height)
        tile = Image.fromarray(image.permute(1, 2, 0).numpy())
        page.paste(tile.resize((side, side), Image.Resampling.NEAREST), (x, y))
        wrong = prediction.truth not in (None, prediction.scores[0].label)
        for line, score in enumerate(prediction.scores[:3]):
            color = "#b02020" if wrong and line == 0 else "black" if line == 0 else "#606060"
            pen.text(
                (x + 2, y + side + 2 + 15 * line),
                f"{100 * score.probability:3.0f} % {score.label}",
                fill=color,
            )
    return torch.from_numpy(numpy.array(page)).permute(2, 0, 1)
