"""Floor 5. The README of an exported folder: what it is, how good, how to load it; ready for the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cifar_dist.data.ingest.near_duplicates import OFFICIAL_LIST
from cifar_dist.inference.trained_model import TrainedModel
from cifar_dist.recipe.schema import to_yaml
from cifar_dist.run_folder import results
from cifar_dist.utils.files import read_json

LOAD = {
    "timm": """import timm, torch

model = timm.create_model("local-dir:.", pretrained=True).eval()   # this folder; or "hf-hub:YOU/NAME"
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)""",
    "onnx": """import numpy, onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {{"images": images}})          # {input}""",
    "pt2": """import torch

model = torch.export.load("model.pt2").module()
logits = model(images)                                           # {input}""",
    "teacher": """# in a recipe of cifar_dist
teacher: {{run: THIS_FOLDER}}""",
}


def model_card(usable: TrainedModel, run: Path, *, to: str, from_bytes: bool, said: str) -> str:
    """Markdown with the Hub's YAML header; numbers come from the run's files."""
    summary, found = results.read_facts(run, "summary.json"), usable.evaluation or {}
    surroundings = results.read_facts(run, "environment.json")
    official = read_json(OFFICIAL_LIST)["data"]
    is_official = surroundings.get("data") == official
    data = "CIFAR-100" if is_official else "other data in the layout of CIFAR-100"
    is_last = usable.checkpoint.name == results.last_checkpoint(summary)
    recipe, side = usable.recipe, usable.recipe.model.image_size
    shape = (
        "uint8 [N, 3, 32, 32], RGB"
        if from_bytes
        else f"float32 [N, 3, {side}, {side}], resized and normalised as config.json says"
    )
    code = LOAD[to].format(input=shape) if "{" in LOAD[to] else LOAD[to]
    weights = "the moving average of the weights" if recipe.averaging else "the last weights"
    temperature = (
        f"Divide the logits by {usable.temperature:.4f}, fitted on held-out rows, for calibrated probabilities."
        if usable.temperature and not (to == "timm" and recipe.model.head == "cosine")
        else ""
    )
    return f"""---
library_name: {"timm" if to == "timm" else "cifar_dist"}
tags: [image-classification, cifar-100, {recipe.model.backbone}]
datasets: [cifar100]
metrics: [accuracy]
---
# {recipe.name}

{recipe.model.backbone} at {side} px on {data} (100 classes), trained by cifar_dist:
{weights} at `{usable.checkpoint.name}`. No teacher is inside. When it was written, {said}.

```python
{code}
```

Trained on pictures of 32 px: shrink others to 32 px first, then enlarge to {side} px ({recipe.model.interpolation},
no anti-aliasing). {temperature}

## How good

{metrics_table(summary, found) if is_last else "Not the run's last checkpoint, so its numbers are not these weights'."}

## What it was made of

Data digest (SHA-256 over both splits) `{surroundings.get("data", "unknown")}`; commit
`{surroundings.get("commit") or "unknown"}`; {surroundings.get("hardware", "unknown hardware")},
{summary.get("world_size", "?")} process(es), {summary.get("micro_batches", "?")} micro-batch(s).

```yaml
{to_yaml(recipe).strip()}
```
"""


def metrics_table(summary: dict[str, Any], found: dict[str, Any]) -> str:
    """What the run's files say, a line each; nothing where they say nothing."""
    rows = [
        ("top-1, % of the test split, last epoch", summary.get("top1")),
        ("top-5, %", summary.get("top5")),
        ("loss", summary.get("loss")),
        ("superclass top-1, %", found.get("superclass_top1")),
        ("expected calibration error, %", (found.get("calibration") or {}).get("ece")),
        ("top-1 without near-duplicates of training pictures, %",
         (found.get("without_near_duplicates") or {}).get("top1")),
        ("val top-1, %", summary.get("val_top1")),
    ]  # fmt: skip
    lines = [f"| {name} | {value:.4g} |" for name, value in rows if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else "The run has no numbers yet."
