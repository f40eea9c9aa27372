"""`runs` lists run folders: their states, damage, and folders that change meanwhile."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from compare import lines
from launcher import Launch

from cifar_dist.run_folder.find import find_runs
from cifar_dist.runs import main
from cifar_dist.training.status import read_statuses
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import atomic_write, remove_folder
from recipes import RecipeMaker


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def content(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return size and modification time of everything in a folder."""
    paths = [folder, *folder.rglob("*")]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def copy(run: Path, name: str, *, minutes_ago: float = 0) -> Path:
    folder = shutil.copytree(run, run.with_name(name))
    os.utime(folder / "metrics.jsonl", (time.time() - 60 * minutes_ago,) * 2)
    return folder


def test_run_in_training_and_after_kill_9(
    tmp_path: Path, recipe: RecipeMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = recipe(run={"epochs": 2000, "log_every_steps": 1}), tmp_path / "runs/tiny"
    ranks = Launch("train", [path], cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while (
            not (run / "metrics.jsonl").exists()
            or "eval" not in (run / "metrics.jsonl").read_text()
        ):
            assert time.monotonic() < deadline, ranks.output
            time.sleep(0.01)
        (status,) = listed(capsys)
        assert main([]) == 0
        header, row = capsys.readouterr().out.splitlines()
        assert [file.name for file in (run / "lock").iterdir()] == ["1.json"]
    finally:
        ranks.kill()
    assert (status["run"], status["state"]) == ("runs/tiny", "training")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (train,) = (r for r in records if r["kind"] == "train" and r["step"] == status["step"])
    assert (status["epoch"], status["epochs"]) == (train["epoch"], 2000)
    assert status["loss"] == train["loss"]
    assert status["top1"] in [record["top1"] for record in records if record["kind"] == "eval"]
    steps_left = 2000 * 6 - train["step"]
    assert status["seconds_left"] == pytest.approx(steps_left * 10 / train["images_per_second"])
    assert header.split() == ["run", "state", "epoch", "step", "loss", "top1", "updated", "left"]
    assert row.startswith("runs/tiny  training  ")

    before = content(tmp_path)
    (status,) = listed(capsys, "runs/tiny")
    assert content(tmp_path) == before
    assert (status["state"], status["step"]) == ("stopped", records[-1]["step"])
    assert status["loss"] is status["seconds_left"] is None


def test_finished_runs_the_last_updated_first(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(run, "a", minutes_ago=300)
    copy(run, "b", minutes_ago=5)
    (evaluation,) = (record for record in lines(run) if record["kind"] == "eval")
    top1, val_top1 = f"{evaluation['top1']:.2f} %", f"{evaluation['val_top1']:.2f} %"
    os.utime(run / "metrics.jsonl", (time.time() - 60 * 60 * 24 * 9,) * 2)
    assert main([]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run        state     epoch  step    top1  val top1     updated",
        f"runs/b     finished  1.0/1    25  {top1}  {val_top1:>8}   5 min ago",
        f"runs/a     finished  1.0/1    25  {top1}  {val_top1:>8}     5 h ago",
        f"runs/tiny  finished  1.0/1    25  {top1}  {val_top1:>8}  9 days ago",
    ]
    shutil.rmtree(run.parent / "a")
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()  # killed before its first record
    (run / "recipe.yaml").touch()
    first, second = listed(capsys)
    assert (first["run"], first["state"], first["step"]) == ("runs/tiny", "stopped", 0)
    assert (second["run"], second["step"]) == ("runs/b", 25)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", "{\n", "metrics.jsonl:1: damaged line; restore the file or delete"),
        ("summary.json", "[", "summary.json is damaged; start the training again to rewrite it"),
        ("recipe.yaml", "run: {", "recipe.yaml:1:7: "),
        ("recipe.yaml", "run: {epochs: 3}", "lacks run.epochs or run.batch_size; restore the file"),
        ("recipe.yaml", "\0", "recipe.yaml: not a recipe"),
        ("recipe.yaml", "[" * 30_000, "recipe.yaml: not a recipe"),  # libyaml would crash
        ("recipe.yaml", "a: &a {b: 1}\nc: {<<: [*a, *a]}", "anchors and aliases are not allowed"),
        ("recipe.yaml", "run: {epochs: .inf, batch_size: 1}", "lacks run.epochs or run.batch_size"),
    ],
)
def test_damaged_run_is_listed_with_the_reason(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    (copy(run, "bad") / name).write_text(text)
    assert main(["runs/tiny", "runs/bad"]) == 0
    rows = sorted(capsys.readouterr().out.splitlines())
    assert rows[0].startswith("run ")
    assert rows[1].startswith("runs/bad   damaged  runs/bad/")
    assert message in rows[1]
    assert rows[2].startswith("runs/tiny  finished")
    states = {status["run"]: status for status in listed(capsys)}
    assert message in states["runs/bad"]["error"]
    assert states["runs/bad"]["step"] is None


def test_runs_that_change_meanwhile(run: Path) -> None:
    """Runs appear and are removed, and files are replaced, as a training does it."""
    stop = threading.Event()

    def change() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            short = run.with_name(f"short_{number}")
            shutil.copytree(run, run.with_name(".copy")).rename(short)
            for name in ("recipe.yaml", "metrics.jsonl"):
                atomic_write(run / name, (run / name).read_bytes())
            remove_folder(short)

    thread = threading.Thread(target=change)
    thread.start()
    seen, deadline = set[str](), time.monotonic() + 0.5
    try:
        while time.monotonic() < deadline:
            statuses = read_statuses(find_runs([run.parent]))
            seen |= {status.run for status in statuses}
            assert {status.state for status in statuses} == {"finished"}
    finally:
        stop.set()
        thread.join()
    assert len(seen) > 1
    assert read_statuses([run.with_name("short_0")]) == []


def test_other_paths(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = run.parent
    other = copy(run, "other")
    (runs / "notes.txt").touch()
    (runs / "empty").mkdir()
    assert find_runs([runs]) == [other, run]
    assert find_runs([run, runs, run]) == [run, other]
    with caplog.at_level("WARNING"):
        assert find_runs([runs / "empty", runs / "notes.txt", run]) == [run]
    assert caplog.messages == [
        f"skipped: {runs / 'empty'} is not a run folder (no recipe.yaml in it)"
    ]
    with pytest.raises(UserError, match=r"runs/typo is not a run folder \(it does not exist\)"):
        main(["runs/tiny", "runs/typo"])
    with pytest.raises(UserError, match="none of these is a run folder; give some, like runs"):
        main(["runs/empty", "runs/notes.txt"])
