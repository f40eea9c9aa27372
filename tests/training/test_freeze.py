"""Frozen and unfrozen parameters: on one and two processes, after a kill, and with averaging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits, largest_difference, tensors
from launcher import train, weight_hashes
from restarts import kill_and_resume
from torch import nn

from cifar_dist.data.dataset import load_split
from cifar_dist.distributed.context import DistContext as RankGroup
from cifar_dist.evaluation.evaluator import evaluate
from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.models.freeze import FreezeConfig, find_unfreeze_epochs, freeze, frozen_parameters
from cifar_dist.optim.optimizer import OptimConfig, build_optimizer
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker

BODY_FIRST_TWO: list[dict[str, Any]] = [{"pattern": "backbone.*", "until_epoch": 2}]


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_patterns_and_epochs() -> None:
    model = build_model(ModelConfig(backbone="test_resnet"), 100)
    every = learning(model)
    freezes = [
        FreezeConfig(pattern="backbone.*", until_epoch=2),
        FreezeConfig(pattern="*.conv1.[0].*"),
    ]
    body = {name for name in every if name.startswith("backbone.")}
    for_good = {name for name in body if name.startswith("backbone.conv1.0.")}
    assert for_good
    seen = [(freeze(model, freezes, epoch=epoch), learning(model)) for epoch in range(4)]
    assert seen == [
        (True, every - body),
        (False, every - body),
        (True, every - for_good),
        (False, every - for_good),
    ]
    assert not freeze(build_model(ModelConfig(backbone="test_resnet"), 100), None, epoch=0)


def test_optimizer_groups_unfreeze_together() -> None:
    """torch's fused SGD needs momentum for all parameters of a group or for none."""
    model = build_model(ModelConfig(backbone="test_resnet"), 100)
    freezes = [
        FreezeConfig(pattern="backbone.*", until_epoch=2),
        FreezeConfig(pattern="backbone.conv1.*", until_epoch=3),
        FreezeConfig(pattern="backbone.layer4.*"),
    ]
    begins = find_unfreeze_epochs(model, freezes)
    assert set(begins.values()) == {0, 2, 3, None}
    assert begins["backbone.conv1.0.weight"] == 3
    freeze(model, freezes, epoch=9)
    optimizer = build_optimizer(OptimConfig(name="sgd", weight_decay=0.1), model, begins)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {begins[names[id(parameter)]] for parameter in group["params"]}
        for group in optimizer.param_groups
    ]
    assert sorted(map(str, groups)) == ["{0}", "{0}", "{2}", "{2}", "{3}", "{3}"]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(learning(model))


def test_frozen_batch_norm_is_in_eval_mode() -> None:
    model = build_model(ModelConfig(backbone="test_resnet"), 100)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    freeze(model, [FreezeConfig(pattern="backbone.*", until_epoch=1)], epoch=0)
    assert not any(norm.training for norm in norms)
    assert model.training
    freeze(model, [FreezeConfig(pattern="backbone.*", until_epoch=1)], epoch=1)
    assert all(norm.training for norm in norms)


def test_evaluation_restores_module_modes(data: Path) -> None:
    model = build_model(ModelConfig(backbone="test_resnet"), 100)
    freeze(model, [FreezeConfig(pattern="backbone.*")], epoch=0)
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    evaluate(
        model,
        load_split(data, "test"),
        torch.arange(23),
        precision="fp32",
        logit_scale=1.0,
        context=RankGroup(0, 1, None),
    )
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("layer9.*", r"no parameter matches 'layer9\.\*'; there are backbone\."),
        ("*", "all parameters are frozen"),
    ],
)
def test_invalid_patterns_are_refused(pattern: str, sentence: str) -> None:
    model = build_model(ModelConfig(backbone="test_resnet"), 100)
    with pytest.raises(UserError, match=sentence):
        freeze(model, [FreezeConfig(pattern=pattern)], epoch=0)


@pytest.mark.parametrize(
    ("optim", "precision"),
    [
        ({}, "fp32"),
        ({"name": "sgd", "sam": {"rho": 0.1}}, "fp32"),
        ({"name": "lamb"}, "fp16"),
        ({"name": "lookahead_sgd"}, "fp32"),
    ],
    ids=["adamw", "sgd sam", "lamb fp16", "lookahead"],
)
def test_same_bits_on_one_and_two_processes_across_unfreezing(
    tmp_path: Path, recipe: RecipeMaker, optim: dict[str, Any], precision: str
) -> None:
    path = recipe(run={"precision": precision}, model={"freeze": BODY_FIRST_TWO}, optim=optim)
    for world_size in (1, 2):
        train(path, f"name=w{world_size}", cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w2")
    train(path, "name=free", "model.freeze=null", cwd=tmp_path)
    assert largest_difference(tmp_path / "runs/w1", tmp_path / "runs/free") > 1e-3


@pytest.mark.parametrize("micro_batches", [2, pytest.param(4, marks=pytest.mark.fault)])
def test_ranks_have_equal_weights_after_unfreezing(
    tmp_path: Path, recipe: RecipeMaker, micro_batches: int
) -> None:
    """DDP must be rebuilt: it does not reduce parameters that were frozen when it was built."""
    path = recipe(
        run={"micro_batches": micro_batches, "batch_size": 12},
        model={"freeze": BODY_FIRST_TWO, "drop_rate": 0.0},
    )
    assert len(set(weight_hashes(path, cwd=tmp_path))) == 1


def test_frozen_weights_do_not_change(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Includes BatchNorm statistics; only the head trains and has optimizer state."""
    frozen = [{"pattern": "backbone.*"}]
    train(recipe("one", run={"epochs": 1}, model={"freeze": frozen}, averaging=None), cwd=tmp_path)
    train(recipe("four", run={"epochs": 4}, model={"freeze": frozen}, averaging=None), cwd=tmp_path)
    one, four = tensors(tmp_path / "runs/one"), tensors(tmp_path / "runs/four")
    for name in (name for name in four if name.startswith("model.")):
        assert torch.equal(one[name], four[name]) == name.startswith("model.backbone."), name
    head = sum(name.startswith("model.head.") for name in four)
    assert len({name.split(".")[1] for name in four if name.startswith("optimizer.")}) == head
    assert json.loads((tmp_path / "runs/four/summary.json").read_text())["finished"]


@pytest.mark.fault
@pytest.mark.parametrize("world_size", [1, 2])
def test_same_bits_after_kills_around_unfreezing(
    tmp_path: Path, recipe: RecipeMaker, world_size: int
) -> None:
    """The backbone unfreezes at step 12 (6 steps per epoch); kills mid-epoch before and after."""
    epochs, until = (8, 3) if world_size == 1 else (60, 20)  # two ranks save about once a second
    path = recipe(
        run={"epochs": epochs, "eval_every_epochs": 2},
        model={"freeze": [{"pattern": "backbone.*", "until_epoch": until}]},
    )
    train(path, "name=straight", cwd=tmp_path, world_size=world_size)
    kill_and_resume(
        path,
        tmp_path,
        [4, 6 * until - 4, 6 * until + 3],
        last_step=6 * epochs,
        world_sizes=[world_size],
    )
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/killed")


def test_frozen_parameters_by_epoch() -> None:
    assert frozen_parameters({"a": 0, "b": 2, "c": None}, 1) == {"b", "c"}
    assert frozen_parameters({"a": 0, "b": 2, "c": None}, 2) == {"c"}
