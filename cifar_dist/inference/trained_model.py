"""Load a trained model with its class names and calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_dist.data.dataset import Labels, no_data_error, read_hierarchy
from cifar_dist.data.ingest.archive import CIFAR_100
from cifar_dist.evaluation.evaluator import block_size
from cifar_dist.evaluation.report import class_name, describe_temperature
from cifar_dist.losses.registry import logit_scale
from cifar_dist.models.classifier import Classifier
from cifar_dist.recipe.runs import load_model, load_run, training_data, weights_digest
from cifar_dist.recipe.schema import Recipe
from cifar_dist.run_folder.evaluations import read_evaluation, read_matching_evaluation, same_data
from cifar_dist.run_folder.results import read_metadata
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.precision import autocast


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedModel:
    """A model in evaluation mode, with its class names and calibration."""

    recipe: Recipe
    checkpoint: Path
    model: Classifier
    fine: tuple[str, ...]  # the class names
    superclass: tuple[str, ...]  # of each class; "" if unknown or without superclasses
    trained_on: str  # see training_data
    data_size: int  # S of the images that it was trained on, in pixels
    evaluation: dict[str, Any] | None  # the evaluation.json of this checkpoint
    temperature: float | None  # chosen on validation rows by `evaluate`

    @property
    def is_cifar_100(self) -> bool:
        return self.trained_on == CIFAR_100.name

    @property
    def temperature_note(self) -> str | None:
        """Return the temperature of `probabilities` and the reason for it, or None if unknown."""
        return None if self.temperature is None else describe_temperature(self.temperature)

    @property
    def logit_scale(self) -> float:
        return logit_scale(self.recipe.losses.values())

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return f32 logits [N, C] on the CPU for uint8 images [N, 3, S, S].

        Uses the blocks of an evaluation, which gives the same bits.
        """
        device = next(self.model.parameters()).device
        parts = []
        for block in images.split(block_size(self.model)):
            with autocast(self.recipe.run.precision, device):
                outputs = self.model(block.to(device))
            parts.append(outputs.logits.float().cpu() * self.logit_scale)
        return torch.cat(parts)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return f64 probabilities [N, C] at the temperature, or at 1 if it is unknown."""
        return (logits.double() / (self.temperature or 1.0)).softmax(1)


def load_trained_model(
    run: Path, checkpoint: str | None = None, data: Path | None = None
) -> TrainedModel:
    """Load a checkpoint of a run (default: the newest) on the accelerator, or on the CPU."""
    recipe, checkpoint_path = load_run(run, checkpoint)
    data = data or Path(recipe.data.path)
    fine, superclass = class_names(run, data, recipe.data.labels)
    environment = read_metadata(run, "environment.json")
    size = environment.get("image_size")  # absent in runs of older versions
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = load_model(recipe, checkpoint_path, len(fine)).eval().requires_grad_(False)
    weights = weights_digest(recipe, checkpoint_path)
    evaluation = read_matching_evaluation(run, checkpoint_path.name, weights=weights)
    temperature = (evaluation or {}).get("temperature")
    return TrainedModel(
        recipe=recipe,
        checkpoint=checkpoint_path,
        model=model.to(device).to(memory_format=torch.channels_last),
        fine=fine,
        superclass=superclass,
        trained_on=training_data(recipe, environment, data),
        data_size=size if isinstance(size, int) else 32,
        evaluation=evaluation,
        temperature=temperature["value"] if temperature else None,
    )


def class_names(run: Path, data: Path, labels: Labels) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the classes and their superclasses, from the data or from the stored evaluation."""
    environment = read_metadata(run, "environment.json")
    if (data / "digest.json").exists():
        if not same_data(environment, data):
            raise UserError(
                f"{data} is not the data that {run} was trained on; give the path of that data "
                "with --data"
            )
        hierarchy = read_hierarchy(data, labels)
        groups = hierarchy.coarse_of_fine.tolist()
        return hierarchy.fine, tuple(class_name(hierarchy.coarse, group) or "" for group in groups)
    evaluation = read_evaluation(run)
    if (
        evaluation is None
        or evaluation.get("data") != environment.get("data")
        or "classes" not in evaluation
    ):
        raise no_data_error(data)  # the class names are unknown
    rows = evaluation["classes"]
    return tuple(row["class"] for row in rows), tuple(row.get("superclass") or "" for row in rows)
