"""`evaluate`: what it writes about a run, and what it says when it cannot."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from cifair_files import content, write_cifair
from launcher import Ranks, train
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from cifar_dist import predict, report
from cifar_dist.data.dataset import (
    data_digest,
    load_split,
    read_digest,
    read_hierarchy,
    write_dataset,
)
from cifar_dist.data.ingest.synthetic import draw_synthetic
from cifar_dist.evaluation.scores import confusion
from cifar_dist.inference.trained_model import load_trained_model
from cifar_dist.recipe.load import load_recipe
from cifar_dist.reporting.comparison import read_run
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other pictures of the same classes."""
    root = tmp_path_factory.mktemp("other") / "data"
    write_dataset(root, *draw_synthetic(train_per_class=2, test_per_class=1), content="other")
    return root


def evaluate(*arguments: object, cwd: Path, world_size: int = 1, expect: int = 0) -> str:
    ranks = Ranks("evaluate", arguments, cwd=cwd, world_size=world_size)
    assert ranks.wait() == [expect] * world_size, ranks.output
    return ranks.output


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def table(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def test_all_numbers_agree_with_each_other_and_with_the_run(run: Path, middle_data: Path) -> None:
    output = evaluate("runs/tiny", cwd=run.parents[1], world_size=2)
    assert "the same bits as" in output
    numbers = found(run / "evaluation")
    summary = json.loads((run / "summary.json").read_text())
    assert [numbers[name] for name in ("top1", "top5", "loss")] == [
        summary[name] for name in ("top1", "top5", "loss")
    ]
    inside, outside = numbers["errors_inside_superclass"], numbers["errors_outside_superclass"]
    assert numbers["top1"] + inside == pytest.approx(numbers["superclass_top1"])
    assert numbers["top1"] + inside + outside == pytest.approx(100)
    assert numbers["top1_interval"]["low"] <= numbers["top1"] <= numbers["top1_interval"]["high"]
    assert numbers["temperature"]["rows"] == 100
    assert numbers["temperature"]["loss"] > 0
    assert numbers["without_near_duplicates"] is None  # the list is of other data
    assert numbers["tta"] == "none"

    predictions = load_file(run / "predictions.safetensors")
    exact = confusion(predictions["labels"], predictions["logits"].argmax(1), 100)
    header, *rows = table(run / "evaluation/confusion.csv")
    assert tuple(header[1:]) == read_hierarchy(middle_data).fine
    assert [[int(cell) for cell in row[1:]] for row in rows] == exact.tolist()
    coarse = table(run / "evaluation/superclass_confusion.csv")
    assert sum(int(cell) for row in coarse[1:] for cell in row[1:]) == 300
    names, *classes = table(run / "evaluation/classes.csv")
    assert len(classes) == 100
    recall = names.index("recall")
    mean = sum(float(row[recall]) for row in classes) / 100  # three pictures of each class
    assert mean == pytest.approx(numbers["top1"])


def test_the_train_split_is_what_was_trained_on(run: Path, tmp_path: Path) -> None:
    output = evaluate("runs/tiny", "--split", "train", "--output", "of_train", cwd=tmp_path)
    held_out = evaluate("runs/tiny", "--split", "val", cwd=tmp_path)
    assert ", held-out, 100 rows" in held_out
    data = Path(load_recipe(run / "recipe.yaml").data.path)
    assert found(tmp_path / "of_train")["rows"] == read_digest(data)["train"]["rows"] - 100, output


def test_flips_cifair_and_a_list_are_labelled_and_apart(
    run: Path, tmp_path: Path, middle_data: Path
) -> None:
    write_cifair(tmp_path, content())
    listed = {
        "data": data_digest(middle_data),
        "min_detail": 0.8,
        "min_layout": 0.9,
        "test_rows": [0, 1, 2],
    }
    (tmp_path / "list.json").write_text(json.dumps(listed))
    arguments = [
        "runs/tiny",
        "--tta-flip",
        "--cifair",
        "ciFAIR-100.zip",
        "--near-duplicates",
        "list.json",
    ]
    output = evaluate(*arguments, "--output", "flipped", cwd=tmp_path)
    assert "mirror image" in output
    assert "same bits" not in output
    numbers = found(tmp_path / "flipped")
    assert numbers["tta"] == "flip"
    usable, test = load_trained_model(run), load_split(middle_data, "test")
    both = (usable.logits(test.images) + usable.logits(test.images.flip(3))) / 2
    assert numbers["loss"] == pytest.approx(float(cross_entropy(both, test.labels)), rel=1e-4)
    assert numbers["cifair"]["rows"] == 23
    without = numbers["without_near_duplicates"]
    assert without["num_excluded"] == 3
    whole = 297 * without["top1"] + 3 * without["top1_excluded"]
    assert whole / 300 == pytest.approx(numbers["top1"])
    newest = max((run / "checkpoints").iterdir()).name
    evaluate("runs/tiny", "--checkpoint", newest, cwd=tmp_path)  # asked for by name: no headline
    assert not (run / "evaluation").exists()


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_a_finished_runs_lost_predictions_are_written_anew(run: Path, harm: str) -> None:
    path, summary = run / "predictions.safetensors", run / "summary.json"
    before, finished = path.read_bytes(), summary.read_text()
    if harm == "damaged":
        path.write_bytes(before[:-100])
        with pytest.raises(UserError, match=r"damaged.*`python -m cifar_dist.evaluate.*anew"):
            read_run(run)
    else:
        path.unlink()
    cut = path.read_bytes() if path.exists() else None
    summary.write_text(json.dumps(json.loads(finished) | {"finished": False}))
    evaluate("runs/tiny", cwd=run.parents[1])
    assert (path.read_bytes() if path.exists() else None) == cut
    summary.write_text(finished)
    output = evaluate("runs/tiny", cwd=run.parents[1])
    assert "written anew" in output
    assert path.read_bytes() == before


def test_an_evaluation_of_other_things_is_left_out(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate("runs/tiny", cwd=tmp_path)
    path, page = run / "evaluation/evaluation.json", tmp_path / "page.html"
    written = found(run / "evaluation")
    assert load_trained_model(run).temperature == written["temperature"]["value"]
    assert load_trained_model(run, written["checkpoint"]).evaluation == written
    assert read_run(run).evaluation == written
    assert not caplog.records
    others = {
        "checkpoint": "step_00000005",
        "split": "train",
        "tta": "flip",
        "data": "f" * 64,
    }
    for name, value in others.items():
        path.write_text(json.dumps(written | {name: value}))
        for read in (lambda: read_run(run).evaluation, lambda: load_trained_model(run).temperature):
            caplog.clear()
            assert read() is None
            (said,) = caplog.messages
            assert str(value) in said
            assert f"`python -m cifar_dist.evaluate {run}`" in said
    damaged: tuple[dict[str, Any], ...] = (
        {"temperature": 3},
        {"temperature": {"x": 1}},
        {"classes": [1]},
    )
    for harm in damaged:
        path.write_text(json.dumps(written | harm))
        for read in (lambda: read_run(run).evaluation, lambda: load_trained_model(run).temperature):
            with pytest.raises(UserError, match=r"evaluation\.json is damaged; `python -m"):
                read()
    path.write_text('{"top1": 1}')
    assert report.main([str(run), "--output", str(page)]) == 0
    assert "For temperature and near-duplicates" in page.read_text()


def test_the_place_of_the_headline_is_for_nothing_else(
    run: Path, tmp_path: Path, other_data: Path
) -> None:
    place = "runs/../runs/tiny/evaluation"
    for arguments, said in {
        ("--data", other_data): "holds other data than runs/tiny was trained on",
        ("--data", other_data, "--output", place): "holds other data than runs/tiny",
        ("--split", "train", "--output", place): "choose another --output",
        ("--tta-flip", "--output", place): "choose another --output",
        ("--checkpoint", "step_00000025", "--output", place): "choose another --output",
    }.items():
        output = evaluate("runs/tiny", *arguments, cwd=tmp_path, expect=2)
        assert said in output
        assert not (run / "evaluation").exists()
    output = evaluate("runs/tiny", "--data", other_data, "--output", "apart", cwd=tmp_path)
    assert "other data" in output
    assert "bits" not in output
    assert found(tmp_path / "apart")["data"] == data_digest(other_data)
    with pytest.raises(UserError, match="holds other data"):
        predict.main([str(run), "--rows", "test:0", "--data", str(other_data)])


def test_what_cannot_be_is_one_sentence(tmp_path: Path, recipe: RecipeMaker) -> None:
    assert "no run folder" in evaluate("nowhere", cwd=tmp_path, expect=2)
    train(recipe(run={"epochs": 1}), cwd=tmp_path)
    (tmp_path / "file").touch()
    said = evaluate("runs/tiny", "--output", "file/below", cwd=tmp_path, expect=2)
    assert "Not a directory" in said
    assert "top1" not in said  # before the work
    assert "held nothing out" in evaluate("runs/tiny", "--split", "val", cwd=tmp_path, expect=2)
    assert "nowhere" in evaluate("runs/tiny", "--cifair", "nowhere", cwd=tmp_path, expect=2)
    with_trace = evaluate("runs/nowhere", "--traceback", cwd=tmp_path, expect=1)
    assert "Traceback" in with_trace
