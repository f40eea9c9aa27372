"""Early stopping: when, why, and with the same result after any kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compare import assert_same_bits, lines
from launcher import train
from restarts import kill_and_resume

from cifar_dist.recipe.load import validate
from cifar_dist.run_folder.checkpoint import checkpoints
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker


@pytest.fixture
def stuck(recipe: RecipeMaker, middle_data: Path) -> Path:
    """A recipe with ten steps per epoch and a learning rate too small to learn."""
    return recipe(
        run={
            "epochs": 30,
            "batch_size": 50,
            "early_stopping_patience": 3,
            "log_every_steps": 7,
        },
        data={"path": str(middle_data), "val_size": 100},
        optim={"name": "sgd", "lr": 1e-9},
        ema=None,
    )


def expected_end(run: Path, patience: int) -> int:
    """Return the step at which the run must stop, computed from its records."""
    best, best_step = -1.0, 0
    for line in (line for line in lines(run) if line["kind"] == "eval"):
        if line["val_top1"] > best:
            best, best_step = line["val_top1"], line["step"]
        elif line["step"] - best_step >= patience * 10:
            return int(line["step"])
    raise AssertionError("never without gain for so long")


def test_early_stop_is_logged_with_its_reason(tmp_path: Path, stuck: Path) -> None:
    for world_size in (1, 2):
        output = train(stuck, f"name=w{world_size}", cwd=tmp_path, world_size=world_size)
        assert "val top1 has not improved for 3 epochs" in output
    run = tmp_path / "runs/w1"
    assert_same_bits(run, tmp_path / "runs/w2")
    end = expected_end(run, 3)
    assert end < 300
    last_train, last_eval = [line for line in lines(run) if line["step"] == end]
    assert sorted((last_train["kind"], last_eval["kind"])) == ["eval", "train"]  # none left open
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] is True
    assert summary["steps"] == end
    assert summary["epochs"] == end / 10
    assert summary["ended_early"].startswith("val top1 has not improved for 3 epochs, since ")
    assert checkpoints(run / "checkpoints")[0].name == f"step_{end:08d}"
    assert (run / "predictions.safetensors").exists()
    again = train(stuck, "name=w1", cwd=tmp_path)  # a finished run stays finished
    assert "finished, top1" in again
    assert "has not improved" in again


def test_early_stop_after_kills_ends_at_the_same_step(tmp_path: Path, stuck: Path) -> None:
    train(stuck, "name=straight", cwd=tmp_path)
    kill_and_resume(stuck, tmp_path, [4, 15, 27], last_step=300)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/killed")
    run = tmp_path / "runs/killed"
    before = lines(run)
    for name in ("summary.json", "predictions.safetensors"):  # as if killed after the last save
        (run / name).unlink()
    train(stuck, "name=killed", cwd=tmp_path)
    assert_same_bits(tmp_path / "runs/straight", run)
    assert lines(run) == before
    assert json.loads((run / "summary.json").read_text())["ended_early"]


def test_improving_run_reaches_the_last_epoch(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path
) -> None:
    path = recipe(
        run={"epochs": 2, "batch_size": 50, "early_stopping_patience": 2},
        data={"path": str(middle_data), "val_size": 100},
    )
    train(path, cwd=tmp_path)
    summary = json.loads((tmp_path / "runs/tiny/summary.json").read_text())
    assert summary["steps"] == 20
    assert "ended_early" not in summary


def test_early_stopping_needs_validation_rows() -> None:
    with pytest.raises(UserError, match=r"set data\.val_size, like 5000, or remove it"):
        validate({"name": "a", "run": {"early_stopping_patience": 3}}, where="here")
