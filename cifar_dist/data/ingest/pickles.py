"""Floor 1, the first step of the walk: CIFAR's own pickles, of any origin, to arrays that are right."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np

from cifar_dist.data.ingest.safe_pickle import Matrix, safe_loads
from cifar_dist.utils.errors import UserError

FINE_CLASSES, COARSE_CLASSES, PIXELS = 100, 20, 3 * 32 * 32
BATCH_LABELS = {"train": "training batch 1 of 1", "test": "testing batch 1 of 1"}
MAX_BYTES = 250_000_000  # train has 155 million; 225 million when Python 3 writes protocol 2


@dataclass(frozen=True, kw_only=True, eq=False)
class RawSplit:
    """One split as its pickle has it: each row of `images` is a picture's 3 x 32 x 32 bytes."""

    images: np.ndarray  # uint8 [N, 3072], C order
    fine_labels: np.ndarray  # int64 [N], 0..99
    coarse_labels: np.ndarray  # int64 [N], 0..19
    filenames: list[str]


@dataclass(frozen=True, kw_only=True)
class RawMeta:
    """The names of the 100 fine and of the 20 coarse classes, in the order of their labels."""

    fine_label_names: list[str]
    coarse_label_names: list[str]


def read_pickle(source: BinaryIO, split: Literal["train", "test"]) -> RawSplit:
    """One split, out of a pickle that may come from anyone; UserError for all but CIFAR's structure.

    154 MB take 0.3 s on one core.
    """
    keys = {"batch_label", "coarse_labels", "data", "filenames", "fine_labels"}
    try:
        value = _fields(source, keys)
        if _text(value["batch_label"]) != BATCH_LABELS[split]:
            raise ValueError(f"its batch_label is not {BATCH_LABELS[split]!r}")
        return _split(value, _texts(value, "filenames"))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise _refusal(split, error) from error


def read_cifair_pickle(source: BinaryIO) -> RawSplit:
    """ciFAIR-100's test split, likewise: CIFAR's structure, in which filenames are missing."""
    try:
        value = _fields(
            source, {"coarse_labels", "data", "fine_labels"}, may_have={"batch_label", "filenames"}
        )
        return _split(value, ["" for _ in _images(value["data"])])
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"its test pickle is refused: {error}; use ciFAIR-100's own") from error


def _split(value: dict[str, Any], filenames: list[str]) -> RawSplit:
    raw = RawSplit(
        images=_images(value["data"]),
        fine_labels=_labels(value, "fine_labels", FINE_CLASSES),
        coarse_labels=_labels(value, "coarse_labels", COARSE_CLASSES),
        filenames=filenames,
    )
    rows = {len(raw.fine_labels), len(raw.coarse_labels), len(raw.filenames)}
    if rows != {len(raw.images)}:
        raise ValueError("its images, labels and filenames differ in number")
    check_hierarchy(raw)
    return raw


def read_meta(source: BinaryIO) -> RawMeta:
    """The class names, out of a pickle that may come from anyone; UserError likewise."""
    try:
        value = _fields(source, {"fine_label_names", "coarse_label_names"})
        fine, coarse = _texts(value, "fine_label_names"), _texts(value, "coarse_label_names")
        if (len(set(fine)), len(set(coarse))) != (FINE_CLASSES, COARSE_CLASSES):
            raise ValueError("it does not name 100 fine and 20 coarse classes, each once")
        if (len(fine), len(coarse)) != (FINE_CLASSES, COARSE_CLASSES) or "" in fine + coarse:
            raise ValueError("a class name is empty or repeated")
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise _refusal("meta", error) from error
    return RawMeta(fine_label_names=fine, coarse_label_names=coarse)


def check_hierarchy(*splits: RawSplit) -> None:
    """ValueError unless each fine class lies in one coarse class, the same in all `splits`."""
    pairs = {p for s in splits for p in zip(s.fine_labels, s.coarse_labels, strict=True)}
    if len(pairs) != len({fine for fine, _ in pairs}):
        raise ValueError("a fine class lies in two coarse classes")


def _refusal(what: str, error: Exception) -> UserError:
    return UserError(f"the {what} pickle is refused: {error}; use the official CIFAR-100 files")


def _fields(
    source: BinaryIO, keys: set[str], *, may_have: AbstractSet[str] = frozenset()
) -> dict[str, Any]:
    data = source.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError("it is larger than any CIFAR-100 file")
    value = safe_loads(data)
    if type(value) is not dict or len(value) > len(keys) + len(may_have):
        raise ValueError(f"it is not a dict of {sorted(keys)}")
    fields = {_text(key): item for key, item in value.items()}
    if fields.keys() - may_have != keys or len(fields) != len(value):
        raise ValueError(f"its keys are not {sorted(keys)}")
    return fields


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str):
        raise ValueError("something else stands where a text should be")
    return value


def _texts(fields: dict[str, Any], key: str) -> list[str]:
    if type(fields[key]) is not list:
        raise ValueError(f"its {key} are not a list")
    return [_text(item) for item in fields[key]]


def _images(matrix: Any) -> np.ndarray:
    pixels = matrix.pixels if isinstance(matrix, Matrix) else None
    if pixels is None or len(pixels) == 0 or pixels.shape[1] != PIXELS:
        raise ValueError(f"its data are not rows of {PIXELS} pixels")
    return pixels


def _labels(fields: dict[str, Any], key: str, classes: int) -> np.ndarray:
    labels = fields[key]
    if type(labels) is not list or any(type(label) is not int for label in labels):
        raise ValueError(f"its {key} are not a list of integers")
    if labels and not (min(labels) >= 0 and max(labels) < classes):
        raise ValueError(f"its {key} are not all in 0..{classes - 1}")
    return np.array(labels, dtype=np.int64)
