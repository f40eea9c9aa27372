"""Every recipe builds as written, and trains two steps with a small network of its family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from all_recipes import RECIPES, ROOT, SMALL
from compare import lines
from launcher import Launch, train

from cifar_dist.losses.registry import LOSSES
from cifar_dist.models.classifier import build_model
from cifar_dist.models.freeze import find_unfreeze_epochs, freeze
from cifar_dist.optim.optimizer import build_optimizer
from cifar_dist.recipe.diff import flatten
from cifar_dist.recipe.dry_run import describe
from cifar_dist.recipe.load import load_recipe, validate
from cifar_dist.recipe.schema import to_dict
from recipes import TeacherMaker


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_recipe_trains(
    tmp_path: Path,
    data: Path,
    middle_data: Path,
    teacher: TeacherMaker,
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
) -> None:
    """Smaller network and images, and 32 rows per batch in at most two micro-batches."""
    recipe = load_recipe(ROOT / path)
    model = recipe.model
    family = next(small for name, small in SMALL.items() if model.backbone.startswith(name))
    changes: dict[str, Any] = {
        "run.epochs": 1,
        "run.batch_size": 32,
        "run.micro_batches": min(recipe.run.micro_batches or 1, 2),
        "run.threads": 1,
        "run.precision": "fp32",
        "run.log_every_steps": 1,
        "data.path": str(data),
        "model.backbone": family,
        "model.pretrained": False,
        "model.image_size": min(model.image_size, 64),
        "optim.warmup_epochs": 0,
        "tracking.mode": "off",
    }
    if recipe.data.val_size:
        changes |= {"data.val_size": 100, "data.path": str(middle_data), "run.batch_size": 250}
    if recipe.averaging and recipe.averaging.start_epoch:
        changes["averaging.start_epoch"] = 1
    if model.progressive_resize:
        changes["model.progressive_resize"] = {"start": 32, "epochs": 1}
    arguments = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    for teachers in recipe.all_teachers:
        scale = {"arcface": {"scale": 8}} if model.head == "cosine" else None
        name = Path(teachers.run).name
        teacher(name, image_size=48, head=model.head, losses=scale)
    if "cached" in (teachers.placement for teachers in recipe.all_teachers):
        ranks = Launch("cache_logits", [ROOT / path, *arguments], cwd=tmp_path)
        assert ranks.wait() == [0], ranks.output
    train(ROOT / path, *arguments, cwd=tmp_path)
    first, second = (
        line for line in lines(tmp_path / "runs" / recipe.name) if line["kind"] == "train"
    )
    for name, loss in recipe.losses.items():  # those of pairs find few among 16 rows of 100 classes
        assert first[name] != second[name] or not loss.trains_classifier
    assert second["step"] == 2
    monkeypatch.chdir(tmp_path)  # where its teachers are
    assert describe(load_recipe(ROOT / path, arguments)).training_flops > 0


def test_full_size_networks_build() -> None:
    """Shapes only: sizes, layer_decay groups, freezing; each network and optimizer once."""
    recipes = [load_recipe(ROOT / path) for path in RECIPES]
    for model_config, optim in {
        repr((r.model, r.optim)): (r.model, r.optim) for r in recipes
    }.values():
        with torch.device("meta"):
            model = build_model(replace(model_config, pretrained=False), 100)
        freeze(model, model_config.freeze, epoch=1000)
        optimizer = build_optimizer(optim, model, find_unfreeze_epochs(model, model_config.freeze))
        trainable = sum(len(group["params"]) for group in optimizer.param_groups)
        assert trainable == sum(parameter.requires_grad for parameter in model.parameters())


# What no recipe should do, or what stands in another one's header as a change of one word.
UNUSED = {
    "augment.vflip",  # the tutorial's, who has it on the host, shows what it costs
    "augment.color_jitter",  # alone; r18_32_one_of has them in a group
    "augment.affine",
    "augment.resizemix",  # no recipe was chosen with it
    "augment.workers",
    "augment.seed",
    "averaging.every_steps",
    "averaging.warmup",
    "model.embedding_size",  # the tutorial's is the default
    "model.weights",
    "optim.eps",
    "optim.gamma",  # a tenth, everywhere
}


def test_every_technique_has_a_recipe() -> None:
    """Each loss, schedule and key of these sections has a recipe with another value than the default."""
    recipes = [load_recipe(ROOT / path) for path in RECIPES]
    assert {name for recipe in recipes for name in recipe.losses} == set(LOSSES)
    schedules = {recipe.optim.schedule for recipe in recipes}
    assert schedules == {"constant", "multistep", "cosine", "one_cycle"}
    optimizers = {recipe.optim.name for recipe in recipes}
    assert optimizers == {"sgd", "momentum", "adamw", "lamb", "muon"}
    default = flatten(to_dict(validate({"name": "a", "averaging": {}}, where="here")))
    used = {
        name
        for recipe in recipes
        for name, value in flatten(to_dict(recipe)).items()
        if value not in (default.get(name), None)
    }
    for name in default:
        section = name.partition(".")[0]
        if section in ("model", "augment", "optim", "averaging"):
            is_used = any(one == name or one.startswith(f"{name}.") for one in used)
            assert is_used != (name in UNUSED), f"{name}: a recipe for it, or its reason in UNUSED"
