"""Optimizers and their groups, and what drops layers, in a real training on one process and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compare import assert_same_bits, largest_difference, lines
from launcher import train
from restarts import kill_and_go_on

from recipes import RecipeMaker

LAYERS = {"name": "adamw", "layer_decay": 0.7}


@pytest.mark.parametrize(
    ("optim", "precision"),
    [
        ({"name": "lamb"}, "fp32"),
        ({"name": "muon"}, "bf16"),
        ({"name": "muon"}, "fp16"),
        (LAYERS, "fp32"),
    ],
    ids=["lamb", "muon", "muon fp16", "layer decay"],
)
def test_two_processes_compute_the_same_bits(
    tmp_path: Path, recipe: RecipeMaker, optim: dict[str, Any], precision: str
) -> None:
    path = recipe(run={"precision": precision, "epochs": 2}, optim=optim)
    for world_size in (1, 2):
        train(path, f"name=w{world_size}", cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w2")


@pytest.mark.fault
@pytest.mark.parametrize("optim", [{"name": "lamb"}, {"name": "muon"}, LAYERS])
def test_killed_runs_end_with_the_same_bits(
    tmp_path: Path, recipe: RecipeMaker, optim: dict[str, Any]
) -> None:
    path = recipe(run={"epochs": 8}, optim=optim)
    train(path, "name=straight", cwd=tmp_path)
    kill_and_go_on(path, tmp_path, [4, 15], last_step=48)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/killed")


def test_the_rate_in_the_log_is_the_recipes(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run={"epochs": 1}, optim=LAYERS | {"lr": 0.003, "schedule": "constant"})
    train(path, cwd=tmp_path)
    said = {line["lr"] for line in lines(tmp_path / "runs/tiny") if line["kind"] == "train"}
    assert said == {0.003}


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_dropped_layers_and_features_are_keyed(
    tmp_path: Path, recipe: RecipeMaker, backbone: str
) -> None:
    """Stochastic depth and dropout: the same on one process and on two, whose ranks draw half each."""
    model = {"backbone": backbone, "drop_rate": 0.2, "drop_path_rate": 0.3}
    path = recipe(run={"epochs": 2}, model=model)
    for world_size in (1, 2):
        train(path, f"name=w{world_size}", cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w2")
    for knob in ("drop_rate", "drop_path_rate"):
        train(path, f"name=no_{knob}", f"model.{knob}=0.0", cwd=tmp_path)
        assert largest_difference(tmp_path / "runs/w1", tmp_path / f"runs/no_{knob}") > 1e-3
