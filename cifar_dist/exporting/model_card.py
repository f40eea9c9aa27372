"""Write the README of an exported folder, a model card for the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cifar_dist.data.ingest.archive import DATASETS
from cifar_dist.inference.trained_model import TrainedModel
from cifar_dist.recipe.schema import to_yaml
from cifar_dist.run_folder.results import last_checkpoint, read_metadata

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


def model_card(
    trained: TrainedModel,
    run: Path,
    *,
    to: str,
    uint8: bool,
    check: str,
    soup: dict[str, Any] | None = None,
) -> str:
    """Return Markdown with the Hub's YAML header; metrics come from the files of the run.

    `check` says how the export compares with the original. `soup` is the ensemble.json of averaged
    runs, the first of which is `run`; it has their metrics.
    """
    summary = read_metadata(run, "summary.json")
    environment = read_metadata(run, "environment.json")
    recipe, size = trained.recipe, trained.recipe.model.image_size
    data_size = trained.data_size
    published = next((one for one in DATASETS.values() if trained.trained_on == one.name), None)
    tags = [
        "image-classification",
        *([published.name.lower()] if published else []),
        recipe.model.backbone,
    ]
    datasets = f"datasets: [{published.key}]\n" if published else ""
    shape = (
        f"uint8 [N, 3, {data_size}, {data_size}], RGB"
        if uint8
        else f"float32 [N, 3, {size}, {size}], resized and normalized as in config.json"
    )
    resize = ""
    if not uint8 and to != "teacher" and size != data_size:  # the others resize images themselves
        resize = (
            f", then resize them to {size} px\n({recipe.model.interpolation}, no anti-aliasing)"
        )
    weights = describe_weights(trained, is_finished=bool(summary.get("finished")), soup=soup)
    temperature = ""
    is_rescaled = to == "timm" and recipe.model.head == "cosine"  # other probabilities
    if trained.temperature not in (None, 1) and not is_rescaled:
        temperature = (
            f"Divide the logits by {trained.temperature:.4f} for probabilities with the least loss "
            "on the validation rows."
        )
    metrics = "Not the last checkpoint of the run, so the metrics of the run do not apply."
    if soup:
        metrics = metrics_table(soup["ensemble"], {"calibration": soup["ensemble"]})
    elif trained.checkpoint.name == last_checkpoint(summary):
        evaluation = trained.evaluation or {}
        # An unfinished run's summary has the accuracies of an earlier evaluation.
        metrics = metrics_table(summary if summary.get("finished") else evaluation, evaluation)
    return f"""---
library_name: {"timm" if to == "timm" else "cifar_dist"}
tags: [{", ".join(tags)}]
{datasets}metrics: [accuracy]
---
# {"Model soup" if soup else recipe.name}

{recipe.model.backbone} at {size} px on {trained.trained_on} ({len(trained.fine)} classes), trained with cifar_dist: {weights}. Check at export: {check}.

```python
{LOAD[to].format(input=shape)}
```

Trained on images of {data_size} px: resize other images to {data_size} px first{resize}. {temperature}

## Results

{metrics}

## Training{f" of {run}" if soup else ""}

Data digest (SHA-256 over both splits) `{environment.get("data", "unknown")}`; commit
`{environment.get("commit") or "unknown"}`; {environment.get("hardware", "unknown hardware")},
{summary.get("world_size", "?")} process(es), {summary.get("micro_batches", "?")} micro-batch(es).

```yaml
{to_yaml(recipe).strip()}
```
"""


def describe_weights(
    trained: TrainedModel, *, is_finished: bool, soup: dict[str, Any] | None
) -> str:
    """Return which weights were exported, like `weights of step_00000600`."""
    if soup:
        members = [f"`{member['run']}`" for member in soup["members"] if member["weight"]]
        return f"the mean of the weights of {', '.join(members)}"
    weights = "averaged weights of" if trained.recipe.averaging else "weights of"
    if not is_finished:
        weights += f" an unfinished training of {trained.recipe.run.epochs} epochs, at checkpoint"
    return f"{weights}\n`{trained.checkpoint.name}`"


def metrics_table(summary: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """Return the known metrics as a Markdown table."""
    rows = [
        ("top-1, % of the test split", summary.get("top1")),
        ("top-5, %", summary.get("top5")),
        ("loss", summary.get("loss")),
        ("superclass top-1, %", evaluation.get("superclass_top1")),
        ("expected calibration error, %", (evaluation.get("calibration") or {}).get("ece")),
        ("top-1 without near-duplicates of training images, %",
         (evaluation.get("without_near_duplicates") or {}).get("top1")),
        ("val top-1, %", summary.get("val_top1")),
    ]  # fmt: skip
    lines = [f"| {name} | {value:.4g} |" for name, value in rows if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else "This run has no metrics yet."
