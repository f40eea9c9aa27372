"""Read CIFAR's pickle files, from any source, into validated arrays."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np

from cifar_dist.data.ingest.safe_pickle import Matrix, safe_loads
from cifar_dist.utils.errors import UserError

PIXELS = 3 * 32 * 32
BATCH_LABELS = {
    "train": "training batch 1 of 1",  # of CIFAR-100, like test
    "test": "testing batch 1 of 1",
    **{f"data_batch_{n}": f"training batch {n} of 5" for n in range(1, 6)},  # of CIFAR-10
    "test_batch": "testing batch 1 of 1",
}
MAX_BYTES = 250_000_000  # train has 155 million, or 225 million if Python 3 writes protocol 2


@dataclass(frozen=True, kw_only=True, eq=False)
class RawSplit:
    """The rows of one split; each row of `images` has the 3 x S x S bytes of an image."""

    images: np.ndarray  # uint8 [N, 3 * S * S], C order
    fine_labels: np.ndarray  # int64 [N]
    coarse_labels: np.ndarray  # int64 [N], or [0] without superclasses
    filenames: list[str]


@dataclass(frozen=True, kw_only=True)
class RawMeta:
    """The names of the classes and of the superclasses, ordered by label."""

    fine_label_names: list[str]
    coarse_label_names: list[str]  # empty without superclasses


def read_pickle(source: BinaryIO, file: str, meta: RawMeta) -> RawSplit:
    """Read the rows of an untrusted pickle; raise UserError unless it has CIFAR's structure.

    `file` is its name, a key of BATCH_LABELS. Its labels must be those of `meta`. 154 MB take 0.3 s on
    one core.
    """
    labels = {"fine_labels", "coarse_labels"} if meta.coarse_label_names else {"labels"}
    try:
        value = _fields(source, {"batch_label", "data", "filenames", *labels})
        if _text(value["batch_label"]) != BATCH_LABELS[file]:
            raise ValueError(f"batch_label is not {BATCH_LABELS[file]!r}")
        return _parse_split(value, _texts(value, "filenames"), meta)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise _invalid(file, error) from error


def read_cifair_pickle(source: BinaryIO, meta: RawMeta) -> RawSplit:
    """Read ciFAIR-100's test split, which has CIFAR's structure without filenames, likewise."""
    try:
        value = _fields(
            source, {"coarse_labels", "data", "fine_labels"}, optional={"batch_label", "filenames"}
        )
        return _parse_split(value, ["" for _ in _images(value["data"])], meta)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"the test pickle is invalid: {error}; use the official ciFAIR-100 files"
        ) from error


def _parse_split(value: dict[str, Any], filenames: list[str], meta: RawMeta) -> RawSplit:
    fine, coarse = meta.fine_label_names, meta.coarse_label_names
    if not coarse:
        value |= {"fine_labels": value["labels"], "coarse_labels": []}
    raw = RawSplit(
        images=_images(value["data"]),
        fine_labels=_labels(value, "fine_labels", len(fine)),
        coarse_labels=_labels(value, "coarse_labels", len(coarse)),
        filenames=filenames,
    )
    rows = {len(raw.fine_labels), len(raw.filenames)}
    if coarse:
        rows.add(len(raw.coarse_labels))
    if rows != {len(raw.images)}:
        raise ValueError("the numbers of images, labels and filenames differ")
    check_hierarchy(raw)
    return raw


def concatenate(parts: Sequence[RawSplit]) -> RawSplit:
    """Return the rows of all parts."""
    return RawSplit(
        images=np.concatenate([part.images for part in parts]),
        fine_labels=np.concatenate([part.fine_labels for part in parts]),
        coarse_labels=np.concatenate([part.coarse_labels for part in parts]),
        filenames=[name for part in parts for name in part.filenames],
    )


def read_meta(source: BinaryIO, file: Literal["meta", "batches.meta"] = "meta") -> RawMeta:
    """Read the class names from an untrusted pickle; raise UserError unless it has that structure.

    `meta` is the file of CIFAR-100, `batches.meta` that of CIFAR-10, which has no superclasses.
    """
    try:
        if file == "meta":
            value = _fields(source, {"fine_label_names", "coarse_label_names"})
            fine, coarse = _texts(value, "fine_label_names"), _texts(value, "coarse_label_names")
        else:
            value = _fields(source, {"label_names", "num_cases_per_batch", "num_vis"})
            fine, coarse = _texts(value, "label_names"), []
        for names in (fine, coarse) if file == "meta" else (fine,):
            if len(names) < 2:
                raise ValueError("it has fewer than two classes")
            if len(set(names)) != len(names) or "" in names:
                raise ValueError("a class name is empty or repeated")
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise _invalid(file, error) from error
    return RawMeta(fine_label_names=fine, coarse_label_names=coarse)


def check_hierarchy(*splits: RawSplit) -> None:
    """Raise ValueError unless each fine class has one coarse class, the same in all `splits`."""
    pairs = {
        pair
        for split in splits
        if len(split.coarse_labels)
        for pair in zip(split.fine_labels, split.coarse_labels, strict=True)
    }
    if len(pairs) != len({fine for fine, _ in pairs}):
        raise ValueError("a fine class has two coarse classes")


def _invalid(file: str, error: Exception) -> UserError:
    name = "CIFAR-100" if file in ("train", "test", "meta") else "CIFAR-10"
    return UserError(f"the {file} pickle is invalid: {error}; use the official {name} files")


def _fields(
    source: BinaryIO, keys: set[str], *, optional: AbstractSet[str] = frozenset()
) -> dict[str, Any]:
    data = source.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError("it is larger than any CIFAR file")
    value = safe_loads(data)
    if type(value) is not dict or len(value) > len(keys) + len(optional):
        raise ValueError(f"it is not a dict with the keys {sorted(keys)}")
    fields = {_text(key): item for key, item in value.items()}
    if fields.keys() - optional != keys or len(fields) != len(value):
        raise ValueError(f"its keys are not {sorted(keys)}")
    return fields


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str):
        raise ValueError("a text has another type")
    return value


def _texts(fields: dict[str, Any], key: str) -> list[str]:
    if type(fields[key]) is not list:
        raise ValueError(f"{key} is not a list")
    return [_text(item) for item in fields[key]]


def _images(matrix: Any) -> np.ndarray:
    pixels = matrix.pixels if isinstance(matrix, Matrix) else None
    if pixels is None or len(pixels) == 0 or pixels.shape[1] != PIXELS:
        raise ValueError(f"data does not have rows of {PIXELS} bytes")
    return pixels


def _labels(fields: dict[str, Any], key: str, classes: int) -> np.ndarray:
    labels = fields[key]
    if type(labels) is not list or any(type(label) is not int for label in labels):
        raise ValueError(f"{key} is not a list of integers")
    if labels and not (min(labels) >= 0 and max(labels) < classes):
        raise ValueError(f"{key} contains values outside 0..{classes - 1}")
    return np.array(labels, dtype=np.int64)
