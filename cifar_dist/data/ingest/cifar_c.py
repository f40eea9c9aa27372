"""Read the published files of CIFAR-100-C (doi.org/10.5281/zenodo.3555552) or CIFAR-10-C."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from cifar_dist.data.corruptions import PUBLISHED_KINDS, SEVERITIES
from cifar_dist.data.dataset import Split
from cifar_dist.utils.errors import UserError, first_line

LABELS = "labels.npy"


def published_splits(folder: Path, test: Split) -> dict[tuple[str, int], Split]:
    """Return the corrupted test splits by kind and severity, as memory-mapped views of the files.

    Each file holds the test split five times, by severity: uint8 [5 N, 32, 32, 3]. Raises UserError
    if a file is missing or has another shape, or if the labels are not those of `test`.
    """
    rows = len(test.labels)
    labels = _map_array(folder / LABELS, (len(SEVERITIES) * rows,))
    if not np.array_equal(labels, np.tile(test.labels.cpu().numpy(), len(SEVERITIES))):
        raise UserError(
            f"{folder / LABELS}: its labels are not those of the test split; give the corrupted "
            "images of the run's data, CIFAR-100-C for CIFAR-100"
        )
    splits = {}
    for kind in PUBLISHED_KINDS:
        array = _map_array(folder / f"{kind}.npy", (len(SEVERITIES) * rows, 32, 32, 3))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            images = torch.from_numpy(array).permute(0, 3, 1, 2)
        for severity, part in zip(SEVERITIES, images.split(rows), strict=True):
            splits[kind, severity] = Split(images=part, labels=test.labels, on_host=True)
    return splits


def _map_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map uint8 values of a .npy file, of which no content is executed.

    Labels may have any integer type.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, TypeError, OverflowError, SyntaxError, EOFError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        problem = f"cannot be read ({reason})"
    else:
        kind = "an integer type" if path.name == LABELS else "uint8"
        is_type = array.dtype.kind in "iu" if path.name == LABELS else array.dtype == np.uint8
        if array.shape == shape and is_type:
            return array
        problem = f"has {array.dtype} {list(array.shape)} instead of {kind} {list(shape)}"
    raise UserError(
        f"{path}: {problem}; give the folder of CIFAR-100-C with the fifteen kinds and {LABELS}"
    ) from None
