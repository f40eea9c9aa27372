"""Tests of the `ensemble` command: weights, diversity, output files and use as a teacher."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launcher import Launch, train
from safetensors.torch import load_file
from scipy import optimize
from small_data import quick_recipe
from stored_runs import replace_predictions
from torch import Tensor

from cifar_dist.data.augment.augmentation import AugmentedBatch
from cifar_dist.data.batches import gather_batch
from cifar_dist.data.dataset import load_split
from cifar_dist.distill.teacher import build_teacher
from cifar_dist.ensemble import main
from cifar_dist.evaluation.metrics import classification_metrics
from cifar_dist.evaluation.scores import choose_temperature, reliability
from cifar_dist.inference.ensembling import choose_weights, combine, diversity, weighted_mean
from cifar_dist.inference.stored_run import read_run
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.teachers import find_teacher
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker, with_teachers


def members(rows: int = 400, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Return the logits of a good, a mediocre and a confidently random member, and the labels."""
    stream = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (rows,), generator=stream)
    hint = torch.nn.functional.one_hot(labels, classes).float()
    noise = torch.randn(3, rows, classes, generator=stream)
    return torch.stack([2 * hint + noise[0], hint + noise[1], 3 * noise[2]]), labels


def test_weights_minimize_the_loss_on_the_simplex() -> None:
    logits, labels = members()
    weights = choose_weights(logits, labels)
    assert sum(weights) == pytest.approx(1, abs=3e-4)
    assert weights[0] > weights[1] > weights[2]

    def loss(values: Any) -> float:
        mean = torch.einsum("r,rnc->nc", torch.tensor(values), logits.double())
        return float(torch.nn.functional.cross_entropy(mean, labels))

    oracle = optimize.minimize(
        loss,
        [1 / 3] * 3,
        bounds=[(0, 1)] * 3,
        constraints=[{"type": "eq", "fun": lambda values: sum(values) - 1}],
    )
    assert weights == pytest.approx(list(oracle.x), abs=3e-3)


def test_diversity_of_known_predictions() -> None:
    def one_hot(classes: list[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(classes), 3).float()

    logits = torch.stack([one_hot([0, 1, 2, 0]), one_hot([0, 1, 1, 1])])
    (pair,) = diversity(["a", "b"], logits, torch.tensor([0, 2, 2, 1]))
    assert (pair.disagree, pair.both_wrong, pair.oracle_top1) == (50, 25, 75)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, middle_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    for seed in (0, 1):
        sections: dict[str, Any] = {"run": {"seed": seed}, "data": {"val_size": 100}}
        train(quick_recipe(folder, f"s{seed}", middle_data, **sections), cwd=folder)
        launch = Launch("evaluate", [f"runs/s{seed}"], cwd=folder)
        assert launch.wait() == [0], launch.output
    return folder


@pytest.fixture
def two_runs(tmp_path: Path, trained: Path) -> Path:
    """Return a copy that a test may modify."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


def test_ensemble_is_the_weighted_mean_and_works_as_a_teacher(
    two_runs: Path, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two_runs)
    assert main(["runs/s0", "runs/s1", "--output", "joined"]) == 0
    report = json.loads(Path("joined/ensemble.json").read_text())
    weights = [member["weight"] for member in report["members"]]
    stored = [load_file(f"runs/s{seed}/predictions.safetensors") for seed in (0, 1)]
    mean = weighted_mean(torch.stack([tensors["logits"] for tensors in stored]), weights)
    joined = load_file("joined/predictions.safetensors")
    assert torch.equal(joined["logits"], mean)
    assert report["ensemble"]["top1"] == classification_metrics(mean, joined["labels"])["top1"]
    val = [load_file(f"runs/s{seed}/evaluation/val_predictions.safetensors") for seed in (0, 1)]
    assert weights == choose_weights(
        torch.stack([tensors["logits"] for tensors in val]), val[0]["labels"]
    )
    # The test split does not affect the weights.
    flipped = {"logits": stored[0]["logits"].flip(1).contiguous(), "labels": stored[0]["labels"]}
    replace_predictions(Path("runs/s0"), flipped)
    assert main(["runs/s0", "runs/s1", "--output", "again"]) == 0
    again = json.loads(Path("again/ensemble.json").read_text())
    assert [member["weight"] for member in again["members"]] == weights

    # The teachers of teachers.yaml return the ensemble's logits.
    teachers = yaml.safe_load(Path("joined/teachers.yaml").read_text())
    sections = (
        {"losses": with_teachers("s0")["losses"]}
        | teachers
        | {"run": {"epochs": 1}, "augment": {"mixup": 0, "cutmix": 0}}
    )
    student = recipe("student", **sections)
    loaded = load_recipe(student)
    teacher = build_teacher(
        loaded.all_teachers,
        [find_teacher(config) for config in loaded.all_teachers],
        num_classes=100,
        device=torch.device("cpu"),
        mesh=lambda over: None,
    )
    assert teacher is not None
    split = load_split(Path(load_recipe(Path("runs/s0/recipe.yaml")).data.path), "test")
    view = AugmentedBatch(
        images=split.images, labels=split.labels, view_ids=torch.zeros(len(split.labels))
    )
    batch = gather_batch(split, torch.arange(len(split.labels)), epoch=0, micro_batch=0)
    assert torch.allclose(teacher(view, batch), mean, atol=1e-4)
    assert "teacher runs/s0" in train(student, cwd=two_runs)


@pytest.mark.parametrize("order", [("s0", "s1"), ("s1", "s0")])
def test_best_member_and_temperature_are_reported(trained: Path, order: tuple[str, str]) -> None:
    runs = [read_run(trained / "runs" / name) for name in order]
    report, joined, labels = combine(runs, uniform=False)
    best = max(report["members"], key=lambda member: member["top1"])
    assert report["against_best_member"]["run"] == best["run"]
    stored = load_file(Path(best["run"]) / "predictions.safetensors")
    single, combined = stored["logits"].argmax(1) == labels, joined.argmax(1) == labels
    assert report["against_best_member"]["only_first"] == int((single & ~combined).sum())
    assert report["against_best_member"]["only_second"] == int((~single & combined).sum())
    val = [load_file(run.folder / "evaluation/val_predictions.safetensors") for run in runs]
    weights = [member["weight"] for member in report["members"]]
    mean = weighted_mean(torch.stack([tensors["logits"] for tensors in val]), weights)
    assert report["temperature"] == pytest.approx(choose_temperature(mean, val[0]["labels"]))
    calibrated = reliability(joined / report["temperature"], labels).ece
    assert report["ensemble"]["ece_at_temperature"] == pytest.approx(calibrated)


def test_existing_output_is_kept_unless_forced(
    two_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(two_runs)
    before = Path("runs/s0/predictions.safetensors").read_bytes()
    Path("file").write_text("years of work")
    for output in ("runs/s0", "file"):
        with pytest.raises(UserError, match=f"{output} already exists; choose another --output$"):
            main(["runs/s0", "runs/s1", "--uniform", "--output", output, "--force"])
    assert capsys.readouterr().out == ""  # refused before the work
    assert Path("runs/s0/predictions.safetensors").read_bytes() == before
    assert Path("file").read_text() == "years of work"
    assert main(["runs/s0", "runs/s1", "--uniform"]) == 0
    with pytest.raises(UserError, match=r"ensemble already exists; .*--force"):
        main(["runs/s0", "runs/s1", "--uniform"])
    assert main(["runs/s1", "runs/s0", "--uniform", "--force"]) == 0
    report = json.loads(Path("ensemble/ensemble.json").read_text())
    assert [member["run"] for member in report["members"]] == ["runs/s1", "runs/s0"]


@pytest.mark.parametrize("change", ["fraction: 0.5", "long_tail: {imbalance: 2}"])
def test_validation_rows_of_another_subset_are_refused(two_runs: Path, change: str) -> None:
    """Also if their labels happen to be the same, as in data that are sorted by class."""
    path = two_runs / "runs/s1/recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["data"] |= yaml.safe_load(change)
    path.write_text(yaml.safe_dump(recipe))
    runs = [read_run(two_runs / "runs" / name) for name in ("s0", "s1")]
    with pytest.raises(UserError, match=r"s1 has other validation rows than .*s0; combine runs"):
        combine(runs, uniform=False)
    combine(runs, uniform=True)


def test_runs_on_other_data_with_the_same_labels_are_refused(two_runs: Path) -> None:
    first, second = (read_run(two_runs / "runs" / name) for name in ("s0", "s1"))
    other = replace(second, environment=second.environment | {"data": "0123"})
    with pytest.raises(UserError, match="has other data than"):
        combine([first, other], uniform=True)


def test_unusable_runs_are_refused_with_a_remedy(
    two_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two_runs)
    with pytest.raises(UserError, match=r"^give two or more different runs"):
        main(["runs/s0"])
    for folders in (["runs/s0", "runs/s0"], ["runs/s0", str(Path("runs/s0").resolve())]):
        with pytest.raises(UserError, match=r"^give two or more different runs"):
            main(folders)
    summary = Path("runs/s1/summary.json")
    finished = summary.read_text()
    summary.unlink()  # as in a finished run that is trained further: its predictions are outdated
    with pytest.raises(UserError, match=r"runs/s1 has no predictions yet; let it finish"):
        main(["runs/s0", "runs/s1"])
    summary.write_text(finished)
    path = Path("runs/s1/evaluation/evaluation.json")
    written = path.read_text()
    path.write_text(json.dumps(json.loads(written) | {"checkpoint": "step_00000001"}))
    with pytest.raises(UserError, match=r"cifar_dist\.evaluate runs/s1"):
        main(["runs/s0", "runs/s1"])  # the stored validation logits are of an earlier checkpoint
    path.write_text(written)
    Path("runs/s1/evaluation/val_predictions.safetensors").unlink()
    with pytest.raises(UserError, match=r"cifar_dist\.evaluate runs/s1"):
        main(["runs/s0", "runs/s1"])
    assert main(["runs/s0", "runs/s1", "--uniform"]) == 0
    report = json.loads(Path("ensemble/ensemble.json").read_text())
    assert report["weights_chosen_on"] == "nothing: uniform"
    stored = load_file("runs/s1/predictions.safetensors")
    fewer = {name: tensor[:-1].contiguous() for name, tensor in stored.items()}
    replace_predictions(Path("runs/s1"), fewer)
    with pytest.raises(UserError, match="other test rows"):
        main(["runs/s0", "runs/s1", "--uniform", "--force"])
    Path("runs/s1/predictions.safetensors").unlink()
    with pytest.raises(UserError, match="no predictions yet"):
        main(["runs/s0", "runs/s1", "--uniform", "--force"])
