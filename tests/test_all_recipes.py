"""Every recipe that is shipped trains: two steps of it, on a small network of the same family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compare import lines
from conftest import TeacherMaker
from ranks import Ranks, train

from cifar_dist.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml"))
SMALL = {  # by how a backbone's name begins
    "resnet9": "resnet9",
    "resnet8x4": "resnet8x4",
    "resnet32x4": "resnet8x1",
    "resnet": "test_resnet",
    "wrn": "wrn_10_1",
    "vit": "test_vit",
    "eva": "test_vit",
    "convnext": "test_convnext",
    "efficientnet": "test_efficientnet",
}


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_recipe_trains(tmp_path: Path, data: Path, teacher: TeacherMaker, path: Path) -> None:
    """As written but for the network, the pictures' size, and 32 rows a batch in two shards at most."""
    recipe = load_recipe(ROOT / path)
    model = recipe.model
    family = next(small for name, small in SMALL.items() if model.backbone.startswith(name))
    changes: dict[str, Any] = {
        "run.epochs": 1,
        "run.batch_size": 32,
        "run.shards": min(recipe.run.shards or 1, 2),
        "run.threads": 1,
        "run.report_every_steps": 1,
        "data.path": str(data),
        "model.backbone": family,
        "model.pretrained": False,
        "model.image_size": min(model.image_size, 64),
        "optim.warmup_epochs": 0,
        "tracking.mode": "off",
    }
    if recipe.data.holdout:
        changes["data.holdout"] = 0
    arguments = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    for taught_by in recipe.taught_by:
        scale = {"arcface": {"scale": 8}} if model.head == "cosine" else None
        name = Path(taught_by.run).name
        teacher(name, image_size=48, head=model.head, losses=scale)
    if "cached" in (taught_by.placement for taught_by in recipe.taught_by):
        ranks = Ranks("cache_logits", [ROOT / path, *arguments], cwd=tmp_path)
        assert ranks.wait() == [0], ranks.output
    train(ROOT / path, *arguments, cwd=tmp_path)
    first, second = (
        line for line in lines(tmp_path / "runs" / recipe.name) if line["kind"] == "train"
    )
    for name, loss in recipe.losses.items():  # those of pairs find few among 16 rows of 100 classes
        assert first[name] != second[name] or not loss.classifies
    assert second["step"] == 2
