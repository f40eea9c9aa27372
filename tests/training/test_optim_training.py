"""Optimizers, parameter groups and drop path on one and two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compare import assert_same_bits, largest_difference, lines
from launcher import train
from restarts import kill_and_resume

from recipes import RecipeMaker

LAYERS = {"name": "adamw", "layer_decay": 0.7}


@pytest.mark.parametrize(
    ("optim", "precision"),
    [
        ({"name": "lamb"}, "fp32"),
        ({"name": "muon"}, "fp32"),
        ({"name": "muon"}, "fp16"),
        (LAYERS, "fp32"),
    ],
    ids=["lamb", "muon", "muon fp16", "layer decay"],
)
def test_one_and_two_processes_have_the_same_bits(
    tmp_path: Path, recipe: RecipeMaker, optim: dict[str, Any], precision: str
) -> None:
    path = recipe(run={"precision": precision, "epochs": 2}, optim=optim)
    for world_size in (1, 2):
        train(path, f"name=w{world_size}", cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w2")


@pytest.mark.fault
@pytest.mark.parametrize("optim", [{"name": "lamb"}, {"name": "muon"}, LAYERS])
def test_killed_runs_match_uninterrupted_runs(
    tmp_path: Path, recipe: RecipeMaker, optim: dict[str, Any]
) -> None:
    path = recipe(run={"epochs": 8}, optim=optim)
    train(path, "name=straight", cwd=tmp_path)
    kill_and_resume(path, tmp_path, [4, 15], last_step=48)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/killed")


def test_logged_learning_rate_follows_the_schedule(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run={"epochs": 1}, optim=LAYERS | {"lr": 0.003, "schedule": "constant"})
    train(path, cwd=tmp_path)
    logged_summary = {
        line["lr"] for line in lines(tmp_path / "runs/tiny") if line["kind"] == "train"
    }
    assert logged_summary == {0.003}


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_drop_path_and_dropout_are_keyed(
    tmp_path: Path, recipe: RecipeMaker, backbone: str
) -> None:
    """Drop path and dropout: same bits on one process and on two."""
    model = {"backbone": backbone, "drop_rate": 0.2, "drop_path_rate": 0.3}
    path = recipe(run={"epochs": 2}, model=model)
    for world_size in (1, 2):
        train(path, f"name=w{world_size}", cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w2")
    for knob in ("drop_rate", "drop_path_rate"):
        train(path, f"name=no_{knob}", f"model.{knob}=0.0", cwd=tmp_path)
        assert largest_difference(tmp_path / "runs/w1", tmp_path / f"runs/no_{knob}") > 1e-3
