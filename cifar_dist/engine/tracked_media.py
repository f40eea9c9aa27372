"""The end of a run for W&B: tables, pictures, confusions, and artifacts that say what was made of what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_dist.data.arrow import (
    DIGEST,
    Hierarchy,
    Split,
    data_digest,
    load_split,
    read_digest,
    read_hierarchy,
)
from cifar_dist.engine.checkpoint import newest_valid
from cifar_dist.engine.evaluation import Evaluation
from cifar_dist.engine.scores import class_scores, confusion, fold

PICTURES = (
    32  # of each kind in the table: the most certain mistakes, and rows of the split in order
)


def shown_rows(logits: Tensor, labels: Tensor) -> list[int]:
    """The most certain mistakes first, then the first rows of the split, each once."""
    sure, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[sure[wrong].argsort(descending=True, stable=True)][:PICTURES].tolist()
    return list(dict.fromkeys(worst + list(range(min(PICTURES, len(labels))))))


def show_predictions(run: Any, evaluation: Evaluation, data: Path) -> None:
    """Log tables of predictions with pictures, of classes, and confusions of both levels."""
    hierarchy, test = read_hierarchy(data), load_split(data, "test")
    if len(evaluation.labels) != len(test.labels):
        return
    table = confusion(evaluation.labels, evaluation.logits.argmax(1), len(hierarchy.fine))
    coarse = fold(table, hierarchy.coarse_of_fine, len(hierarchy.coarse))
    run.log(
        {
            "predictions": predictions_table(evaluation, test, hierarchy),
            "classes": classes_table(table, hierarchy),
            "confusion": confusion_table(table, hierarchy.fine),
            "superclass_confusion": confusion_table(coarse, hierarchy.coarse),
        }
    )


def predictions_table(evaluation: Evaluation, test: Split, hierarchy: Hierarchy) -> Any:
    import wandb

    probabilities = evaluation.logits.softmax(1)
    columns = ["test row", "picture", "true", "predicted", "confidence, %", "right"]
    rows = []
    for row in shown_rows(evaluation.logits, evaluation.labels):
        truth, said = int(evaluation.labels[row]), int(probabilities[row].argmax())
        picture = wandb.Image(test.images[row].permute(1, 2, 0).cpu().numpy())
        confidence = round(100 * float(probabilities[row, said]), 2)
        names = hierarchy.fine
        rows.append([row, picture, names[truth], names[said], confidence, truth == said])
    return wandb.Table(columns=columns, data=rows)


def classes_table(table: Tensor, hierarchy: Hierarchy) -> Any:
    import wandb

    columns = ["class", "pictures", "top-1, %", "precision, %", "most often taken for", "times"]
    rows = []
    for name, one in zip(hierarchy.fine, class_scores(table), strict=True):
        other = "" if one.mistaken_for is None else hierarchy.fine[one.mistaken_for]
        rows.append([name, one.pictures, one.recall, one.precision, other, one.mistaken])
    return wandb.Table(columns=columns, data=rows)


def confusion_table(table: Tensor, names: tuple[str, ...]) -> Any:
    """W&B's own chart of a confusion, from counts rather than from a row for each picture."""
    import wandb

    cells = torch.cartesian_prod(torch.arange(len(names)), torch.arange(len(names))).tolist()
    rows = [[names[i], names[j], int(table[i, j])] for i, j in cells]
    columns = ["Actual", "Predicted", "nPredictions"]
    return wandb.plot_table(
        vega_spec_name="wandb/confusion_matrix/v1",
        data_table=wandb.Table(columns=columns, data=rows),
        fields={name: name for name in columns},
        string_fields={"title": "Confusion matrix"},
    )


def log_artifacts(run: Any, folder: Path, data: Path, *, upload_weights: bool) -> None:
    """The data and teachers' cached logits as inputs, the last checkpoint as output; digests in all.

    The data go in as their digest file, never as pictures. Offline W&B has no inputs, so there they
    are logged like outputs and told by their types.
    """
    import wandb

    digest = data_digest(data)
    dataset = wandb.Artifact(
        f"data-{digest[:12]}", "dataset", metadata={"digest": digest, **read_digest(data)}
    )
    dataset.add_file(str(data / DIGEST))
    inputs = [dataset]
    recipe = dict(run.config)
    taught_by = [recipe["teacher"]] if recipe["teacher"] else recipe["teachers"] or []
    for teacher in taught_by:
        if teacher["placement"] == "cached":
            manifest = Path(teacher["cache"] or Path(teacher["run"]) / "logits") / "manifest.json"
            said = json.loads(manifest.read_text())
            cache = wandb.Artifact(f"logits-{said['sha256'][:12]}", "logits", metadata=said)
            cache.add_file(str(manifest))
            inputs.append(cache)
    for artifact in inputs:
        (run.log_artifact if run.offline else run.use_artifact)(artifact)

    saved = newest_valid(folder / "checkpoints")
    if saved is not None:
        facts = {"data": digest, "teachers": recipe["environment"]["teachers"], "step": saved.name}
        model = wandb.Artifact(f"model-{run.id}", "model", metadata=facts)
        model.add_file(str(saved / "manifest.json"))  # the SHA-256 of each file
        for path in sorted(saved.glob("*.safetensors")):
            if upload_weights:
                model.add_file(str(path))
            else:
                model.add_reference(path.resolve().as_uri(), name=path.name, checksum=False)
        run.log_artifact(model, aliases=["final"])
