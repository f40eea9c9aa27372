"""Modify the files of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def replace_predictions(run: Path, tensors: dict[str, Tensor]) -> None:
    """Replace a run's stored predictions, as if the run's weights had made them."""
    weights = json.loads((run / "summary.json").read_text())["weights"]
    save_file(tensors, run / "predictions.safetensors", metadata={"weights": weights})
