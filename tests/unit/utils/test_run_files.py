"""The files of a run folder: only the last line may be cut; other damage is reported and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launcher import train

from cifar_dist import export, predict, report
from cifar_dist.recipe.load import load_recipe
from cifar_dist.run_folder.records import MetricsFile
from cifar_dist.training.start import find_finished_run
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker, with_teachers

LINES = [
    {"kind": kind, "step": step, "epoch": step / 2, "loss": 1.5}
    for step, kind in enumerate(("train", "eval", "train"), 1)
]
TEXTS = [json.dumps(line) for line in LINES]


@pytest.mark.parametrize("cut", ["", TEXTS[2][:-1], TEXTS[2][:20], "null", "\0\0", "\udcff"])
def test_cut_last_line_is_dropped(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f"{TEXTS[0]}\n{TEXTS[1]}\n{cut}".encode(errors="surrogateescape"))
    assert MetricsFile(path).read() == LINES[:2]
    assert MetricsFile(path).truncate(1, 0) == 0
    assert path.read_text() == f"{TEXTS[0]}\n"


@pytest.mark.parametrize("evaluated", [None, 10, 4_000, 9_900])
def test_newest_records_of_a_long_file(tmp_path: Path, evaluated: int | None) -> None:
    """A megabyte: an evaluation in its last lines, far back, or none at all."""
    path = tmp_path / "metrics.jsonl"
    records = [
        {"kind": "train", "step": step, "epoch": step / 10, "text": "x" * 50}
        for step in range(10_000)
    ]
    newest = {"train": records[-1]}
    if evaluated is not None:
        newest["eval"] = records[evaluated] | {"kind": "eval"}
        records.insert(evaluated + 1, newest["eval"])
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "eval"')
    assert MetricsFile(path).newest("train", "eval") == newest
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-50], "{", *lines[-50:]]))
    with pytest.raises(UserError, match=rf"metrics\.jsonl:{len(lines) - 49}: damaged line"):
        MetricsFile(path).newest("train", "eval")


def test_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert MetricsFile(path).read() == []
    path.write_text("\n".join(TEXTS))
    assert MetricsFile(path).read() == LINES
    assert MetricsFile(path).truncate(3, 2) == 2  # the step of the evaluation
    assert path.read_text() == "".join(f"{text}\n" for text in TEXTS)


def test_evaluation_after_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    """A stopped run saves before the evaluation of its step, which the next start repeats."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{text}\n" for text in TEXTS))
    assert MetricsFile(path).truncate(2, 0) == 0
    assert MetricsFile(path).read() == LINES[:1]


@pytest.mark.parametrize(
    "bad",
    ["", "null", "[1]", TEXTS[1][:20], '{"kind": "train", "step": 2}', "\0\0", "\udcff",
     '{"kind": "train", "step": "2", "epoch": 1}', '{"kind": "eval", "step": 2, "epoch": NaN}',
     '{"kind": "eval", "step": 2, "epoch": 1, "loss": 1e999}', '{"kind": "eval", "step": 2, "epoch": null}'],
)  # fmt: skip
@pytest.mark.parametrize("index", [0, 1, 2])
def test_damaged_line_is_reported_and_nothing_is_lost(tmp_path: Path, bad: str, index: int) -> None:
    path = tmp_path / "metrics.jsonl"
    texts = [*TEXTS[:index], bad, *TEXTS[index + 1 :]]
    content = "".join(f"{text}\n" for text in texts).encode(errors="surrogateescape")
    path.write_bytes(content)
    for act in (MetricsFile(path).read, lambda: MetricsFile(path).truncate(3, 3)):
        with pytest.raises(UserError, match=rf"metrics\.jsonl:{index + 1}: .*restore"):
            act()
    assert path.read_bytes() == content


def test_summary_without_accuracy_is_not_a_finished_run(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parents[1])
    recipe, path = load_recipe(run / "recipe.yaml"), run / "summary.json"
    summary = json.loads(path.read_text())
    assert find_finished_run(recipe) == summary
    del summary["top1"]
    path.write_text(json.dumps(summary))
    assert find_finished_run(recipe) is None
    assert "finished, top1" in train("runs/tiny/recipe.yaml", cwd=run.parents[1])
    assert "top1" in json.loads(path.read_text())


@pytest.mark.parametrize("damage", ['{"top1": 1', "[1]"])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("summary.json", "training"),
        ("environment.json", "training"),
        ("evaluation/evaluation.json", r"cifar_dist\.evaluate"),
    ],
)
def test_damaged_file_is_an_error_and_absent_one_is_not(
    run: Path, tmp_path: Path, name: str, remedy: str, damage: str
) -> None:
    readers = {
        "report": lambda: report.main([str(run), "--output", str(tmp_path / "page.html")]),
        "predict": lambda: predict.main([str(run), "--rows", "test:0"]),
        "export": lambda: export.main(
            [str(run), "--to", "teacher", "--output", str(tmp_path / "exported"), "--force"]
        ),
    }
    if name == "summary.json":
        del readers["predict"]  # which does not read it
    path = run / name
    path.unlink(missing_ok=True)
    for command, read in readers.items():
        assert read() == 0, command
    path.parent.mkdir(exist_ok=True)
    path.write_text(damage)
    for command, read in readers.items():
        with pytest.raises(UserError, match=rf"{name} is damaged; .*{remedy}"):
            pytest.fail(f"{command} ended with {read()}")


def test_lost_last_evaluation_is_repeated(run: Path) -> None:
    summary, metrics = run / "summary.json", run / "metrics.jsonl"
    before, lines = json.loads(summary.read_text()), MetricsFile(metrics).read()
    assert [line["kind"] for line in lines].count("eval") == 1
    metrics.write_text(
        "".join(json.dumps(line) + "\n" for line in lines if line["kind"] == "train")
    )
    incomplete = {name: value for name, value in before.items() if "top1" not in name}
    summary.write_text(json.dumps(incomplete))
    for _ in range(2):
        output = train("runs/tiny/recipe.yaml", cwd=run.parents[1])
        assert f"finished, top1 {before['top1']:.2f} %" in output
        after = json.loads(summary.read_text())
        assert {name: after[name] for name in ("top1", "top5", "loss", "val_top1")} == {
            name: before[name] for name in ("top1", "top5", "loss", "val_top1")
        }
        assert MetricsFile(metrics).read() == lines


@pytest.mark.parametrize("damage", ['{"top1": 1', "[1]"])
@pytest.mark.parametrize("name", ["summary.json", "environment.json"])
def test_training_replaces_a_damaged_file(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    monkeypatch.chdir(run.parents[1])
    before = json.loads((run / name).read_text())
    (run / name).write_text(damage)
    assert find_finished_run(load_recipe(run / "recipe.yaml")) is None
    assert "finished, top1" in train("runs/tiny/recipe.yaml", cwd=run.parents[1])
    assert json.loads((run / name).read_text()).keys() == before.keys()


@pytest.mark.parametrize("sections", [{"run": {"batch_size": 1000}}, with_teachers("absent")])
def test_refused_start_leaves_no_folder(
    tmp_path: Path, recipe: RecipeMaker, sections: dict[str, Any]
) -> None:
    train(recipe(**sections), cwd=tmp_path, world_size=2, expect=2)
    assert not (tmp_path / "runs/tiny").exists()


def test_trailing_zeros_are_an_unfinished_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        file.append({"kind": "train", "step": step, "epoch": 0.5, "loss": 1.0})
    file.sync()
    with file.path.open("ab") as tail:
        tail.write(b'{"kind": "tr' + bytes(4096))
    assert [line["step"] for line in file.read()] == [1, 2]
    file.truncate(2, 0)
    assert file.path.read_bytes().endswith(b"}\n")
