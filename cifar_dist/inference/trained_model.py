"""Floor 5. A trained run as something to use: its judged weights, its classes' names, its calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_dist.data.dataset import Hierarchy, read_hierarchy
from cifar_dist.evaluation.evaluator import block_size
from cifar_dist.losses.classification import logit_scale
from cifar_dist.models.backbones import Classifier
from cifar_dist.recipe.runs import load_model, load_run
from cifar_dist.recipe.schema import Recipe
from cifar_dist.run_folder.evaluations import read_evaluation, read_matching_evaluation, same_data
from cifar_dist.run_folder.results import read_facts
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.precision import autocast


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedModel:
    """A model in evaluation mode, and what its outputs mean."""

    recipe: Recipe
    checkpoint: Path
    model: Classifier
    fine: tuple[str, ...]
    superclass: tuple[str, ...]  # of each fine class; "" where the data do not say
    evaluation: dict[str, Any] | None  # what `evaluate` wrote about this very checkpoint
    temperature: float | None  # fitted on held-out rows by `evaluate`; None where it was not

    @property
    def logit_scale(self) -> float:
        return logit_scale(self.recipe.losses.values())

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """f32 [N, C] on the CPU of uint8 [N, 3, 32, 32], as an evaluation computes them."""
        device = next(self.model.parameters()).device
        parts = []
        for block in images.split(block_size(self.model)):  # as an evaluation does: the same bits
            with autocast(self.recipe.run.precision, device):
                outputs = self.model(block.to(device))
            parts.append(outputs.logits.float().cpu() * self.logit_scale)
        return torch.cat(parts)

    def probabilities(self, logits: Tensor) -> Tensor:
        """f64 [N, C], calibrated where a temperature is known."""
        return (logits.double() / (self.temperature or 1.0)).softmax(1)


def load_trained_model(
    run: Path, checkpoint: str | None = None, data: Path | None = None
) -> TrainedModel:
    """A run's newest checkpoint, or one by name, on this machine's accelerator where it has one."""
    recipe, saved = load_run(run, checkpoint)
    fine, superclass = class_names_of(run, data or Path(recipe.data.path))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = load_model(recipe, saved, len(fine)).eval().requires_grad_(False)
    found = read_matching_evaluation(run, saved.name)
    fitted = (found or {}).get("temperature")
    return TrainedModel(
        recipe=recipe,
        checkpoint=saved,
        model=model.to(device).to(memory_format=torch.channels_last),
        fine=fine,
        superclass=superclass,
        evaluation=found,
        temperature=fitted["value"] if fitted else None,
    )


def class_names_of(run: Path, data: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fine classes and the superclass of each: from the run's data, or else from its evaluation."""
    environment = read_facts(run, "environment.json")
    if (data / "digest.json").exists():
        if not same_data(environment, data):
            raise UserError(
                f"{data} holds other data than {run} was trained on; give the place of those with --data"
            )
        return names_of(read_hierarchy(data))
    found = read_evaluation(run)
    if found is None or found.get("data") != environment.get("data") or "classes" not in found:
        raise UserError(
            f"{data} has no data, so the classes have no names; give its place with --data"
        )
    rows = found["classes"]
    return tuple(row["class"] for row in rows), tuple(row["superclass"] or "" for row in rows)


def names_of(hierarchy: Hierarchy) -> tuple[tuple[str, ...], tuple[str, ...]]:
    places = hierarchy.coarse_of_fine.tolist()
    return hierarchy.fine, tuple("" if place < 0 else hierarchy.coarse[place] for place in places)
