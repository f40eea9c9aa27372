"""Runs with label noise, a long tail, a fraction of the rows and balanced class weights."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from compare import assert_same_bits, lines
from launcher import Launch, train
from restarts import kill_and_resume
from safetensors.torch import load_file

from cifar_dist.data.dataset import load_split
from cifar_dist.data.training_rows import TrainingData, training_data
from cifar_dist.losses.classification import balanced_weights
from cifar_dist.recipe.load import load_recipe
from cifar_dist.training.setup import setup
from recipes import RecipeMaker

HARDER = {
    "fraction": 0.67,  # 4 of the 6 rows of each class
    "long_tail": {"imbalance": 2},  # 4 to 2 rows
    "val_size": 100,
    "label_noise": {"kind": "asymmetric", "rate": 0.6},  # also the only validation row of a class
}


def selected(path: Path) -> TrainingData:
    data = load_recipe(path).data
    return training_data(data, load_split(Path(data.path), "train"))


@pytest.fixture
def harder(recipe: RecipeMaker, middle_data: Path) -> Path:
    return recipe(
        run={"epochs": 2, "batch_size": 20, "log_every_steps": 1},
        data={"path": str(middle_data)} | HARDER,
        losses={"cross_entropy": {"class_weights": "balanced"}},
    )


@pytest.mark.fault
def test_same_bits_after_a_kill_on_two_processes(tmp_path: Path, harder: Path) -> None:
    rows = len(selected(harder).rows)
    steps = 2 * (rows // 20)
    output = train(harder, "name=one", cwd=tmp_path)
    assert f"training data: {rows} of 600 rows, 1 to 3 per class; " in output
    assert "labels are wrong (asymmetric noise)" in output
    kill_and_resume(harder, tmp_path, [3], last_step=steps, world_sizes=(2, 1))
    assert_same_bits(tmp_path / "runs/one", tmp_path / "runs/killed")
    assert lines(tmp_path / "runs/one")[-1]["step"] == steps


def test_training_uses_the_selected_rows_their_labels_and_the_weights_of_their_classes(
    tmp_path: Path, harder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, original = selected(harder), load_split(Path(load_recipe(harder).data.path), "train")
    with ExitStack() as stack:
        run, _ = setup(load_recipe(harder), Accelerator(cpu=True), stack)
        steps = [next(run.batches) for _ in range(run.steps_per_epoch)]
        batches = [batch for micro_batches in steps for batch in micro_batches]
        augmented = [run.objective.augment(batch) for batch in batches]
    assert torch.equal(run.rows, data.rows)
    assert data.val_rows is not None
    assert run.val_rows is not None
    assert torch.equal(run.val_rows, data.val_rows)
    rows = torch.cat([batch.rows for batch in batches])
    assert len(rows) == len(data.rows) // 20 * 20
    assert torch.isin(rows, data.rows).all()
    labels = torch.cat([batch.labels for batch in augmented])
    assert torch.equal(labels, data.split.labels[rows])
    assert not torch.equal(labels, original.labels[rows])
    weights = balanced_weights(data.split.labels[data.rows], 100)
    assert run.objective.class_weights is not None
    assert torch.equal(run.objective.class_weights, weights)


def test_evaluation_uses_the_noisy_labels_of_validation_and_training_rows_but_clean_test_labels(
    tmp_path: Path, harder: Path
) -> None:
    train(harder, cwd=tmp_path)
    launch = Launch("evaluate", ["runs/tiny"], cwd=tmp_path)
    assert launch.wait() == [0], launch.output
    data, run = selected(harder), tmp_path / "runs/tiny"
    original = load_split(Path(load_recipe(harder).data.path), "train")
    stored = load_file(run / "evaluation/val_predictions.safetensors")
    assert data.val_rows is not None
    assert torch.equal(stored["labels"], data.split.labels[data.val_rows])
    assert not torch.equal(stored["labels"], original.labels[data.val_rows])
    top1 = 100 * (stored["logits"].argmax(1) == stored["labels"]).double().mean()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val_top1"] == pytest.approx(float(top1))
    test = load_split(Path(load_recipe(harder).data.path), "test")
    assert torch.equal(load_file(run / "predictions.safetensors")["labels"], test.labels)
    words = ["runs/tiny", "--split", "train", "--output", "train"]
    launch = Launch("evaluate", words, cwd=tmp_path)
    assert launch.wait() == [0], launch.output
    report = json.loads((tmp_path / "train/evaluation.json").read_text())
    counts = torch.bincount(data.split.labels[data.rows], minlength=100)
    assert [row["count"] for row in report["classes"]] == counts.tolist()
