"""Tests of the `evaluate` command: metrics, output files and error messages."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cifair_files import content, write_cifair
from launcher import Launch, train
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from cifar_dist import export, near_duplicates, predict, report
from cifar_dist.data.dataset import (
    data_digest,
    load_split,
    read_digest,
    read_hierarchy,
    write_dataset,
)
from cifar_dist.data.ingest.synthetic import draw_synthetic
from cifar_dist.evaluation.scores import confusion
from cifar_dist.inference.stored_run import read_run
from cifar_dist.inference.trained_model import load_trained_model
from cifar_dist.recipe.load import load_recipe
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other images of the same classes."""
    root = tmp_path_factory.mktemp("other") / "data"
    write_dataset(root, *draw_synthetic(train_per_class=2, test_per_class=1), content="other")
    return root


@pytest.fixture(scope="session")
def other_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    train_rows, test_rows, meta = draw_synthetic(train_per_class=1, test_per_class=1)
    names = replace(meta, fine_label_names=[f"not {name}" for name in meta.fine_label_names])
    root = tmp_path_factory.mktemp("other_classes") / "data"
    write_dataset(root, train_rows, test_rows, names, content="other")
    return root


def evaluate(*arguments: object, cwd: Path, world_size: int = 1, expect: int = 0) -> str:
    launch = Launch("evaluate", arguments, cwd=cwd, world_size=world_size)
    assert launch.wait() == [expect] * world_size, launch.output
    return launch.output


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def read_csv(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def test_metrics_are_consistent_and_match_the_run(run: Path, middle_data: Path) -> None:
    output = evaluate("runs/tiny", cwd=run.parents[1], world_size=2)
    assert "the same bits as" in output
    metrics = read_report(run / "evaluation")
    summary = json.loads((run / "summary.json").read_text())
    assert [metrics[name] for name in ("top1", "top5", "loss")] == [
        summary[name] for name in ("top1", "top5", "loss")
    ]
    inside, outside = metrics["errors_inside_superclass"], metrics["errors_outside_superclass"]
    assert metrics["top1"] + inside == pytest.approx(metrics["superclass_top1"])
    assert metrics["top1"] + inside + outside == pytest.approx(100)
    assert metrics["top1_interval"]["low"] <= metrics["top1"] <= metrics["top1_interval"]["high"]
    assert metrics["temperature"]["rows"] == 100
    assert metrics["temperature"]["loss"] > 0
    assert metrics["without_near_duplicates"] is None  # the default list is for CIFAR-100
    assert metrics["tta"] == "none"

    predictions = load_file(run / "predictions.safetensors")
    expected = confusion(predictions["labels"], predictions["logits"].argmax(1), 100)
    header, *rows = read_csv(run / "evaluation/confusion.csv")
    assert tuple(header[1:]) == read_hierarchy(middle_data).fine
    assert [[int(cell) for cell in row[1:]] for row in rows] == expected.tolist()
    coarse = read_csv(run / "evaluation/superclass_confusion.csv")
    assert sum(int(cell) for row in coarse[1:] for cell in row[1:]) == 300
    names, *classes = read_csv(run / "evaluation/classes.csv")
    assert len(classes) == 100
    recall = names.index("recall")
    mean = sum(float(row[recall]) for row in classes) / 100  # three images per class
    assert mean == pytest.approx(metrics["top1"])


def test_train_split_excludes_validation_rows(run: Path, tmp_path: Path) -> None:
    output = evaluate("runs/tiny", "--split", "train", "--output", "of_train", cwd=tmp_path)
    assert ", val, 100 rows" in evaluate("runs/tiny", "--split", "val", cwd=tmp_path)
    data = Path(load_recipe(run / "recipe.yaml").data.path)
    rows = read_digest(data)["train"]["rows"] - 100
    assert read_report(tmp_path / "of_train")["rows"] == rows, output


def test_tta_cifair_and_near_duplicates_are_labeled(
    run: Path, tmp_path: Path, middle_data: Path
) -> None:
    write_cifair(tmp_path, content())
    near_duplicates = {
        "data": data_digest(middle_data),
        "min_detail": 0.8,
        "min_layout": 0.9,
        "test_rows": [0, 1, 2],
    }
    (tmp_path / "list.json").write_text(json.dumps(near_duplicates))
    output = evaluate(
        "runs/tiny",
        "--tta-flip",
        *("--cifair", "ciFAIR-100.zip"),
        *("--near-duplicates", "list.json"),
        *("--output", "flipped"),
        cwd=tmp_path,
    )
    assert "mirror image" in output
    assert "same bits" not in output
    metrics = read_report(tmp_path / "flipped")
    assert metrics["tta"] == "flip"
    model, test = load_trained_model(run), load_split(middle_data, "test")
    mean = (model.logits(test.images) + model.logits(test.images.flip(3))) / 2
    assert metrics["loss"] == pytest.approx(float(cross_entropy(mean, test.labels)), rel=1e-4)
    assert metrics["cifair"]["rows"] == 23
    without = metrics["without_near_duplicates"]
    assert without["num_excluded"] == 3
    total = 297 * without["top1"] + 3 * without["top1_excluded"]
    assert total / 300 == pytest.approx(metrics["top1"])


def test_named_checkpoint_writes_nothing_by_default(run: Path, tmp_path: Path) -> None:
    newest = max((run / "checkpoints").iterdir()).name
    evaluate("runs/tiny", "--checkpoint", newest, cwd=tmp_path)
    assert not (run / "evaluation").exists()


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_lost_predictions_of_a_finished_run_are_rewritten(run: Path, harm: str) -> None:
    path, summary = run / "predictions.safetensors", run / "summary.json"
    before, finished = path.read_bytes(), summary.read_text()
    if harm == "damaged":
        path.write_bytes(before[:-100])
        with pytest.raises(UserError, match=r"damaged.*`python -m cifar_dist.evaluate.*rewrites"):
            read_run(run)
    else:
        path.unlink()
    lost = path.read_bytes() if path.exists() else None
    summary.write_text(json.dumps(json.loads(finished) | {"finished": False}))
    evaluate("runs/tiny", cwd=run.parents[1])
    assert (path.read_bytes() if path.exists() else None) == lost
    summary.write_text(finished)
    output = evaluate("runs/tiny", cwd=run.parents[1])
    assert "was missing, damaged or of other weights; rewritten" in output
    assert path.read_bytes() == before


def test_stored_evaluation_is_ignored_unless_it_matches(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate("runs/tiny", cwd=tmp_path)
    path, page = run / "evaluation/evaluation.json", tmp_path / "page.html"
    stored = read_report(run / "evaluation")
    assert load_trained_model(run).temperature == stored["temperature"]["value"]
    assert load_trained_model(run, stored["checkpoint"]).evaluation == stored
    assert read_run(run).evaluation == stored
    assert not caplog.records
    readers = (lambda: read_run(run).evaluation, lambda: load_trained_model(run).temperature)
    others = {"checkpoint": "step_00000005", "split": "train", "tta": "flip", "data": "f" * 64}
    for name, value in others.items():
        path.write_text(json.dumps(stored | {name: value}))
        for read in readers:
            caplog.clear()
            assert read() is None
            (warning,) = caplog.messages
            assert str(value) in warning
            assert f"`python -m cifar_dist.evaluate {run}`" in warning
    damaged: tuple[dict[str, Any], ...] = (
        {"temperature": 3},
        {"temperature": {"x": 1}},
        {"classes": [1]},
    )
    for harm in damaged:
        path.write_text(json.dumps(stored | harm))
        for read in readers:
            with pytest.raises(UserError, match=r"evaluation\.json is damaged; `python -m"):
                read()
    path.write_text('{"top1": 1}')
    assert report.main([str(run), "--output", str(page)]) == 0
    assert "For temperature and near-duplicates" in page.read_text()


def test_run_evaluation_folder_is_reserved_for_the_default_evaluation(
    run: Path, tmp_path: Path, other_data: Path, other_classes: Path
) -> None:
    folder = "runs/../runs/tiny/evaluation"
    for arguments, message in {
        ("--data", other_data): "is not the data that runs/tiny was trained on",
        ("--data", other_data, "--output", folder): "is not the data that runs/tiny",
        ("--split", "train", "--output", folder): "choose another --output",
        ("--tta-flip", "--output", folder): "choose another --output",
        ("--checkpoint", "step_00000025", "--output", folder): "choose another --output",
    }.items():
        output = evaluate("runs/tiny", *arguments, cwd=tmp_path, expect=2)
        assert message in output
        assert not (run / "evaluation").exists()
    output = evaluate(
        "runs/tiny", "--data", other_classes, "--output", "apart", cwd=tmp_path, expect=2
    )
    assert (
        f"{other_classes} has other classes than the data that runs/tiny was trained on" in output
    )
    output = evaluate("runs/tiny", "--data", other_data, "--output", "apart", cwd=tmp_path)
    assert "other data" in output
    assert "bits" not in output
    assert read_report(tmp_path / "apart")["data"] == data_digest(other_data)
    with pytest.raises(UserError, match="is not the data that"):
        predict.main([str(run), "--rows", "test:0", "--data", str(other_data)])


def test_missing_data_is_reported_with_its_origin_and_the_option(
    run: Path, tmp_path: Path, middle_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(middle_data), "data/elsewhere"))
    message = (
        f"there is no data in data/elsewhere (relative to {tmp_path}); give its folder with "
        "--data FOLDER"
    )
    assert f"error: {message}\n" in evaluate("runs/tiny", cwd=tmp_path, expect=2)
    monkeypatch.chdir(tmp_path)
    commands: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (predict.main, ["runs/tiny", "--rows", "test:0"]),
        (export.main, ["runs/tiny", "--to", "teacher"]),
        (near_duplicates.main, ["--output", "list.json", "--data", "data/elsewhere"]),
    ]
    for command, arguments in commands:
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            command(arguments)
    evaluate("runs/tiny", "--data", middle_data, cwd=tmp_path)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        predict.main(["runs/tiny", "--rows", "test:0"])  # the class names are known now
    assert predict.main(["runs/tiny", "--rows", "test:0", "--data", str(middle_data)]) == 0


def test_errors_are_reported_before_the_work(tmp_path: Path, recipe: RecipeMaker) -> None:
    assert "not a run folder" in evaluate("nowhere", cwd=tmp_path, expect=2)
    train(recipe(run={"epochs": 1}), cwd=tmp_path)
    (tmp_path / "file").touch()
    output = evaluate("runs/tiny", "--output", "file/below", cwd=tmp_path, expect=2)
    assert "Not a directory" in output
    assert "top1" not in output
    output = evaluate("runs/tiny", "--split", "val", cwd=tmp_path, expect=2)
    assert "no validation rows" in output
    assert "nowhere" in evaluate("runs/tiny", "--cifair", "nowhere", cwd=tmp_path, expect=2)
    for split, option, message in (
        ("val", "--cifair", "--cifair cannot be combined with --split val"),
        ("val", "--near-duplicates", "lists rows of the test split; remove it, or --split val"),
        ("train", "--near-duplicates", "lists rows of the test split; remove it, or --split train"),
    ):
        output = evaluate("runs/tiny", "--split", split, option, "x", cwd=tmp_path, expect=2)
        assert message in output
    with_trace = evaluate("runs/nowhere", "--traceback", cwd=tmp_path, expect=1)
    assert "Traceback" in with_trace
