"""The promises hold for any number of classes; everything about superclasses needs superclasses."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cifair_files import content, write_cifair
from compare import assert_same_bits
from launcher import Launch, train
from restarts import kill_and_resume
from safetensors.torch import load_file
from small_data import with_classes
from wandb_records import all_records, rows_of

from cifar_dist import predict, report
from cifar_dist.data.dataset import (
    class_names,
    classes_digest,
    data_digest,
    load_split,
    write_dataset,
)
from cifar_dist.inference.trained_model import load_trained_model
from cifar_dist.recipe.dry_run import describe
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.runs import training_data
from cifar_dist.run_folder.checkpoint import latest_valid, load_progress
from recipes import RecipeMaker, with_teachers


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of `data` with 12 classes and without superclasses."""
    root = tmp_path_factory.mktemp("twelve") / "data"
    write_dataset(root, *with_classes(12), content="other")
    return root


def data_section(count: int, data: Path, folder: Path) -> dict[str, Any]:
    """Return `data` of a recipe with this number of classes: 100 fine ones, 20 superclasses, or others."""
    if count in (20, 100):
        return {"path": str(data), "labels": "coarse" if count == 20 else "fine"}
    write_dataset(folder / "data", *with_classes(count), content="other")
    return {"path": str(folder / "data")}


@pytest.mark.parametrize(
    "count", [20, *(pytest.param(n, marks=pytest.mark.fault) for n in (10, 12, 100))]
)
def test_same_bits_with_processes_kills_and_in_evaluations(
    tmp_path: Path, recipe: RecipeMaker, data: Path, count: int
) -> None:
    path = recipe(run={"epochs": 2}, data=data_section(count, data, tmp_path))
    train(path, "name=straight", cwd=tmp_path)
    train(path, "name=two", cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/two")
    kill_and_resume(path, tmp_path, [4], last_step=12, world_sizes=[1, 2])
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/killed")
    logits = load_file(tmp_path / "runs/killed/predictions.safetensors")["logits"]
    assert logits.shape == (23, count)
    for world_size in (1, 2):
        ranks = Launch("evaluate", ["runs/killed"], cwd=tmp_path, world_size=world_size)
        assert ranks.wait() == [0] * world_size, ranks.output
        assert "the same bits as" in ranks.output, ranks.output


def output_of(command: str, *arguments: object, cwd: Path) -> str:
    ranks = Launch(command, arguments, cwd=cwd)
    assert ranks.wait() == [0], ranks.output
    return ranks.output


def test_results_without_superclasses_leave_them_out(
    tmp_path: Path,
    recipe: RecipeMaker,
    data: Path,
    twelve: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Files, log, predictions, W&B tables and the page; 12 classes everywhere."""
    path = recipe(run={"epochs": 1}, data={"path": str(twelve)}, tracking={"mode": "offline"})
    train(path, cwd=tmp_path)
    run, names = tmp_path / "runs/tiny", list(class_names(twelve))
    duplicates = {"data": data_digest(twelve), "min_detail": 1, "min_layout": 1, "test_rows": [0]}
    (tmp_path / "list.json").write_text(json.dumps(duplicates))
    output = output_of("evaluate", run, "--near-duplicates", tmp_path / "list.json", cwd=tmp_path)
    assert "superclass" not in output
    metrics = json.loads((run / "evaluation/evaluation.json").read_text())
    assert "superclass" not in json.dumps(metrics)
    assert metrics["without_near_duplicates"]["note"].endswith("; a lower bound")
    assert [row["class"] for row in metrics["classes"]] == names
    header, *rows = csv.reader((run / "evaluation/confusion.csv").read_text().splitlines())
    assert header[1:] == [row[0] for row in rows] == names
    assert {file.name for file in (run / "evaluation").iterdir()} == {
        *("classes.csv", "confusion.csv", "evaluation.json"),
    }
    ood = ("--ood", data, "--output", tmp_path / "ood")  # 100 classes
    assert "out-of-distribution" in output_of("evaluate", run, *ood, cwd=tmp_path)
    write_cifair(tmp_path, content())
    ranks = Launch("evaluate", [run, "--cifair", tmp_path / "ciFAIR-100.zip"], cwd=tmp_path)
    assert ranks.wait() == [2]
    assert "has no superclasses, so" in ranks.output

    (tables,) = [row for row in rows_of(all_records(run)) if "predictions.path" in row]
    assert "confusion_table.path" in tables
    assert not [name for name in tables if name.startswith("superclass")]

    arguments = [str(run), "--rows", "test:0-2", "--json", str(tmp_path / "p.json")]
    assert predict.main(arguments) == 0
    printed = capsys.readouterr().out
    first, *_ = json.loads((tmp_path / "p.json").read_text())
    assert f"%  {first['scores'][0]['label']}  " in printed
    assert {key for score in first["scores"] for key in score} == {"label", "probability"}
    assert first["truth"] in names
    assert report.main([str(run), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Most frequent confusions" in page
    assert "Trained on other data." in page
    assert "superclass" not in page.partition('<section id="errors"')[2].partition("</section>")[0]


def test_superclasses_as_labels(
    tmp_path: Path, recipe: RecipeMaker, data: Path, twelve: Path
) -> None:
    """Class names, digests, data set rows; other labels are another run."""
    path = recipe(run={"epochs": 1}, data={"path": str(data), "labels": "coarse"})
    train(path, cwd=tmp_path)
    run, names = tmp_path / "runs/tiny", class_names(data, "coarse")
    stored = load_recipe(run / "recipe.yaml")
    assert stored.data.labels == "coarse"
    environment = json.loads((run / "environment.json").read_text())
    saved = latest_valid(run / "checkpoints")
    assert saved is not None
    progress = load_progress(saved)
    assert environment["data"] == progress["data"] == data_digest(data)
    assert progress["classes"] == classes_digest(names) != classes_digest(class_names(data))
    labels = load_file(run / "predictions.safetensors")["labels"]
    assert torch.equal(labels, load_split(data, "test", labels="coarse").labels)
    output_of("evaluate", run, cwd=tmp_path)
    metrics = json.loads((run / "evaluation/evaluation.json").read_text())
    assert [row["class"] for row in metrics["classes"]] == list(names)
    assert "superclass_top1" not in metrics
    trained = load_trained_model(run)
    assert trained.fine == names
    assert trained.trained_on == "the superclasses of other data"
    gone = load_trained_model(run, data=tmp_path / "gone")  # names from the evaluation
    assert gone.fine == names
    write_cifair(tmp_path, content())
    cifair = ("--cifair", tmp_path / "ciFAIR-100.zip", "--output", tmp_path / "cifair")
    output_of("evaluate", run, *cifair, cwd=tmp_path)  # the images of the test split, here
    both = json.loads((tmp_path / "cifair/evaluation.json").read_text())
    assert both["cifair"]["top1"] == metrics["top1"]

    official = {"data": "b07d8a0b9728eb970a33da019a42d584d4a541ff6b4e09c43f41b5e4b58321b6"}
    assert training_data(stored, official, data) == "the superclasses of CIFAR-100"
    fine = replace(stored, data=replace(stored.data, labels="fine"))
    assert training_data(fine, official, data) == "CIFAR-100"
    more = describe(fine).parameters - describe(stored).parameters
    assert more == 80 * (96 + 1)  # 80 more classes: weights of 96 features, and a bias

    output = train(path, "data.labels=fine", cwd=tmp_path, expect=2)
    assert "trained with another recipe (data.labels: coarse -> fine)" in output
    output = train(path, "name=a", f"data.path={twelve}", cwd=tmp_path, expect=2)
    assert f"data.labels=coarse: {twelve} has no superclasses; use data.labels=fine" in output
    assert output.count("error:") == 1


def test_teacher_and_origin_of_a_fork_have_the_same_labels(
    tmp_path: Path, recipe: RecipeMaker, data: Path
) -> None:
    sections = {"run": {"epochs": 1}, "augment": {"mixup": 0, "cutmix": 0}}
    for labels in ("fine", "coarse"):
        train(recipe(labels, data={"path": str(data), "labels": labels}, **sections), cwd=tmp_path)
    coarse = {"path": str(data), "labels": "coarse"}
    for name, expect in (("coarse", 0), ("fine", 2)):
        student = recipe(f"of_{name}", data=coarse, **sections, **with_teachers(name))
        output = train(student, cwd=tmp_path, expect=expect)
        assert ("other classes than the coarse labels of" in output) == (expect == 2)
    fork = recipe("fork", data=coarse, **sections | {"run": {"epochs": 2}})
    output = train(fork, "--fork", "runs/fine", cwd=tmp_path, expect=2)
    assert "was trained on the fine labels, so neither its classes" in output
