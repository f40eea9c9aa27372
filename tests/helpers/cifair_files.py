"""Write ciFAIR files."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

from small_data import first_rows

from cifar_dist.data.ingest.synthetic import draw_synthetic


def content() -> dict[str, Any]:
    """Return the content of ciFAIR's test pickle: a dict with str keys and no filenames."""
    raw = first_rows(draw_synthetic(train_per_class=1, test_per_class=1)[1], 23)
    labels = {"fine_labels": raw.fine_labels.tolist(), "coarse_labels": raw.coarse_labels.tolist()}
    return {"batch_label": "testing batch 1 of 1", **labels, "data": raw.images}


def write_cifair(folder: Path, value: object, *, protocol: int = 3) -> Path:
    """Write `value` as folder/ciFAIR-100/test and as folder/ciFAIR-100.zip; return the former folder."""
    path = folder / "ciFAIR-100/test"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    with zipfile.ZipFile(folder / "ciFAIR-100.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, "ciFAIR-100/test")
        archive.writestr("ciFAIR-100/train", b"never read")
        archive.writestr("../escaped", b"never written")
    return path.parent
