"""Ensembles: weights from held-out rows, by known answers; the result teaches as it predicts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launcher import Ranks, train
from safetensors.torch import load_file, save_file
from scipy import optimize
from small_data import quick_recipe
from torch import Tensor

from cifar_dist.data.augment.augmentation import AugmentedBatch
from cifar_dist.data.batches import gather_batch
from cifar_dist.data.dataset import load_split
from cifar_dist.distill.teacher import build_teacher
from cifar_dist.ensemble import choose_weights, combine, diversity, main, weighted_mean
from cifar_dist.evaluation.metrics import classification_metrics
from cifar_dist.evaluation.scores import fit_temperature, reliability
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.teachers import find_teacher
from cifar_dist.reporting.comparison import read_run
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker, taught


def members(rows: int = 400, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Three members: good, less good, and one that knows nothing and says so loudly."""
    stream = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (rows,), generator=stream)
    hint = torch.nn.functional.one_hot(labels, classes).float()
    noise = torch.randn(3, rows, classes, generator=stream)
    return torch.stack([2 * hint + noise[0], hint + noise[1], 3 * noise[2]]), labels


def test_weights_are_the_best_on_the_simplex() -> None:
    logits, labels = members()
    weights = choose_weights(logits, labels)
    assert sum(weights) == pytest.approx(1, abs=3e-4)
    assert weights[0] > weights[1] > weights[2]

    def loss(given: Any) -> float:
        mean = torch.einsum("r,rnc->nc", torch.tensor(given), logits.double())
        return float(torch.nn.functional.cross_entropy(mean, labels))

    oracle = optimize.minimize(
        loss,
        [1 / 3] * 3,
        bounds=[(0, 1)] * 3,
        constraints=[{"type": "eq", "fun": lambda given: sum(given) - 1}],
    )
    assert weights == pytest.approx(list(oracle.x), abs=3e-3)


def test_diversity_by_hand() -> None:
    def sure(classes: list[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(classes), 3).float()

    logits = torch.stack([sure([0, 1, 2, 0]), sure([0, 1, 1, 1])])
    (pair,) = diversity(["a", "b"], logits, torch.tensor([0, 2, 2, 1]))
    assert (pair.disagree, pair.both_wrong, pair.oracle_top1) == (50, 25, 75)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, middle_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    for seed in (0, 1):
        sections: dict[str, Any] = {"run": {"seed": seed}, "data": {"val_size": 100}}
        train(quick_recipe(folder, f"s{seed}", middle_data, **sections), cwd=folder)
        ranks = Ranks("evaluate", [f"runs/s{seed}"], cwd=folder)
        assert ranks.wait() == [0], ranks.output
    return folder


@pytest.fixture
def two_runs(tmp_path: Path, trained: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


def test_two_runs_join_and_teach(
    two_runs: Path, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two_runs)
    assert main(["runs/s0", "runs/s1", "--output", "joined"]) == 0
    found = json.loads(Path("joined/ensemble.json").read_text())
    weights = [member["weight"] for member in found["members"]]
    stored = [load_file(f"runs/s{seed}/predictions.safetensors") for seed in (0, 1)]
    mean = weighted_mean(torch.stack([one["logits"] for one in stored]), weights)
    joined = load_file("joined/predictions.safetensors")
    assert torch.equal(joined["logits"], mean)
    assert found["ensemble"]["top1"] == classification_metrics(mean, joined["labels"])["top1"]
    held = [load_file(f"runs/s{seed}/evaluation/held_out.safetensors") for seed in (0, 1)]
    assert weights == choose_weights(
        torch.stack([one["logits"] for one in held]), held[0]["labels"]
    )
    # nothing of the test split moves the weights
    save_file(
        {"logits": stored[0]["logits"].flip(1).contiguous(), "labels": stored[0]["labels"]},
        "runs/s0/predictions.safetensors",
    )
    assert main(["runs/s0", "runs/s1", "--output", "again"]) == 0
    again = json.loads(Path("again/ensemble.json").read_text())
    assert [member["weight"] for member in again["members"]] == weights

    # the section is one of a recipe, and what it says is the ensemble's logits
    teachers = yaml.safe_load(Path("joined/teachers.yaml").read_text())
    sections = (
        {"losses": taught("s0")["losses"]}
        | teachers
        | {"run": {"epochs": 1}, "augment": {"mixup": 0, "cutmix": 0}}
    )
    student = recipe("student", **sections)
    loaded = load_recipe(student)
    teacher = build_teacher(
        loaded.all_teachers,
        [find_teacher(one) for one in loaded.all_teachers],
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
def test_it_is_compared_with_the_best_member_and_tempered_on_held_out_rows(
    trained: Path, order: tuple[str, str]
) -> None:
    runs = [read_run(trained / "runs" / name) for name in order]
    found, joined, labels = combine(runs, uniform=False)
    best = max(found["members"], key=lambda member: member["top1"])
    assert found["against_best_member"]["run"] == best["run"]
    stored = load_file(Path(best["run"]) / "predictions.safetensors")
    right, together = stored["logits"].argmax(1) == labels, joined.argmax(1) == labels
    assert found["against_best_member"]["only_first"] == int((right & ~together).sum())
    assert found["against_best_member"]["only_second"] == int((~right & together).sum())
    held = [load_file(run.folder / "evaluation/held_out.safetensors") for run in runs]
    weights = [member["weight"] for member in found["members"]]
    mean = weighted_mean(torch.stack([one["logits"] for one in held]), weights)
    assert found["temperature"] == pytest.approx(fit_temperature(mean, held[0]["labels"]))
    tempered = reliability(joined / found["temperature"], labels).ece
    assert found["ensemble"]["ece_at_temperature"] == pytest.approx(tempered)


def test_nothing_is_overwritten_by_chance(
    two_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(two_runs)
    before = Path("runs/s0/predictions.safetensors").read_bytes()
    Path("file").write_text("years of work")
    for output in ("runs/s0", "file"):
        with pytest.raises(UserError, match=f"{output} is there already; choose another --output$"):
            main(["runs/s0", "runs/s1", "--uniform", "--output", output, "--force"])
    assert capsys.readouterr().out == ""  # nothing was computed
    assert Path("runs/s0/predictions.safetensors").read_bytes() == before
    assert Path("file").read_text() == "years of work"
    assert main(["runs/s0", "runs/s1", "--uniform"]) == 0
    with pytest.raises(UserError, match=r"ensemble is there already; .*--force"):
        main(["runs/s0", "runs/s1", "--uniform"])
    assert main(["runs/s1", "runs/s0", "--uniform", "--force"]) == 0
    said = json.loads(Path("ensemble/ensemble.json").read_text())
    assert [member["run"] for member in said["members"]] == ["runs/s1", "runs/s0"]


def test_what_cannot_be_joined_is_one_sentence(
    two_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two_runs)
    with pytest.raises(UserError, match="two runs or more"):
        main(["runs/s0", str(Path("runs/s0").resolve())])
    summary = Path("runs/s1/summary.json")
    finished = summary.read_text()
    summary.unlink()  # it was forced on, and its predictions are those of its earlier end
    with pytest.raises(UserError, match=r"runs/s1 has no predictions yet; let it finish"):
        main(["runs/s0", "runs/s1"])
    summary.write_text(finished)
    path = Path("runs/s1/evaluation/evaluation.json")
    written = path.read_text()
    path.write_text(json.dumps(json.loads(written) | {"checkpoint": "step_00000001"}))
    with pytest.raises(UserError, match=r"cifar_dist\.evaluate runs/s1"):
        main(["runs/s0", "runs/s1"])  # chosen on what an earlier checkpoint says
    path.write_text(written)
    Path("runs/s1/evaluation/held_out.safetensors").unlink()
    with pytest.raises(UserError, match=r"cifar_dist\.evaluate runs/s1"):
        main(["runs/s0", "runs/s1"])
    assert main(["runs/s0", "runs/s1", "--uniform"]) == 0
    said = json.loads(Path("ensemble/ensemble.json").read_text())
    assert said["weights_chosen_on"] == "nothing: equal"
    stored = load_file("runs/s1/predictions.safetensors")
    save_file(
        {name: one[:-1].contiguous() for name, one in stored.items()},
        "runs/s1/predictions.safetensors",
    )
    with pytest.raises(UserError, match="other test rows"):
        main(["runs/s0", "runs/s1", "--uniform", "--force"])
    Path("runs/s1/predictions.safetensors").unlink()
    with pytest.raises(UserError, match="no predictions yet"):
        main(["runs/s0", "runs/s1", "--uniform", "--force"])
