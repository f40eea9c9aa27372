"""Compare runs with the published results of the tutorial.

https://github.com/DocsaidLab/cifar100-training-demo reports the accuracy of the best *test* epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cifar_dist.data.dataset import OFFICIAL_DIGEST
from cifar_dist.recipe.load import load_recipe
from cifar_dist.reporting.comparison import Group, experiment_key, key_of, mean_std
from cifar_dist.utils.recipe_files import RECIPES


@dataclass(frozen=True, kw_only=True)
class Row:
    config: str  # of the tutorial, and of recipes/tutorial/CONFIG.yaml
    what: str
    published: float | None  # percent
    epoch: int | None
    ours: str | None  # the comparable recipe in recipes/


PUBLISHED = (
    Row(config="resnet18_baseline", what="ResNet-18 from scratch, 32 px", published=44.26, epoch=186, ours="r18_32"),
    Row(config="resnet18_augment", what="+ one of five albumentations", published=36.48, epoch=None, ours="r18_32_one_of"),
    Row(config="resnet18_baseline_wd01", what="+ weight decay 0.1", published=40.12, epoch=None, ours="r18_32"),
    Row(config="resnet18_baseline_lbsmooth", what="+ label smoothing 0.1", published=44.81, epoch=59, ours="r18_32"),
    Row(config="resnet18_pretrained", what="ImageNet weights, 32 px", published=56.70, epoch=112, ours=None),
    Row(config="resnet18_pretrained_arcface", what="+ ArcFace", published=57.92, epoch=199, ours=None),
    Row(config="resnet18_pretrained_cosface", what="+ CosFace: reported as similar", published=None, epoch=None, ours=None),
    Row(config="resnet18_pretrained_arcface_224x224", what="+ 224 px", published=79.57, epoch=29, ours="r18_224"),
    Row(config="resnet50_pretrained_arcface", what="ResNet-50, ArcFace, 32 px", published=61.76, epoch=199, ours="r50_32"),
    Row(config="resnet50_pretrained_arcface_224x224", what="ResNet-50, ArcFace, 224 px", published=81.21, epoch=174, ours="r50_224"),
    Row(config="resnet18_pretrained_arcface_kd", what="ResNet-18 at 32 px, distilled from ResNet-50 at 224 px", published=57.37, epoch=None, ours="r18_32_kd"),
    Row(config="resnet18_pretrained_arcface_mst", what="randomly at 32 or 64 px", published=None, epoch=None, ours=None),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    accuracy: str  # mean ± standard deviation
    runs: str  # number of runs and epochs


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A published row with measured results; None if there is no such run."""

    row: Row
    protocol_best: Measured | None  # the tutorial's protocol at the best test epoch, as published
    protocol_last: Measured | None  # the same runs at the last epoch
    ours: Measured | None  # the comparable recipe at the last epoch


def compare_with_published(groups: Sequence[Group]) -> list[PublishedRow]:
    """Return the published rows with the results of the groups that trained their recipes.

    A group counts for a recipe if it differs only in name and seeds, and was trained on CIFAR-100.
    """
    by_key = {key_of(group.runs[0]): group for group in groups}

    def measured(name: str | None, value: str) -> Measured | None:
        if name is None:
            return None
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        group = by_key.get(experiment_key(recipe, recipe.run.micro_batches, OFFICIAL_DIGEST))
        accuracy = mean_std(group, value) if group else None
        if group is None or accuracy is None:
            return None
        epochs = group.mean("epochs")
        runs = f"n = {len(group.runs)}, {epochs:g} epoch{'s' if epochs != 1 else ''}"
        return Measured(accuracy, runs)

    return [
        PublishedRow(
            row=row,
            protocol_best=measured(f"tutorial/{row.config}", "best_test_top1"),
            protocol_last=measured(f"tutorial/{row.config}", "top1"),
            ours=measured(row.ours, "top1"),
        )
        for row in PUBLISHED
    ]
