"""A run never uses or shows results that its weights, data or teachers did not make."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launcher import Launch, train
from restarts import EVERY_STEP, wait_for_step
from small_data import small_data

from cifar_dist.data.dataset import write_dataset
from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.watchdog import watchdog
from cifar_dist.inference.stored_run import read_run
from cifar_dist.inference.trained_model import load_trained_model
from cifar_dist.optim.optimizer import OptimConfig
from cifar_dist.optim.schedule import schedule_problem
from cifar_dist.run_folder.checkpoint import checkpoints, load_progress
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker, with_teachers


def evaluate(run: Path) -> None:
    ranks = Launch("evaluate", [run], cwd=run.parents[1])
    assert ranks.wait() == [0], ranks.output


# ----------------------------------------------------------------------------- results of other weights


def test_results_of_other_weights_are_ignored(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of another run with the same number of steps is copied into this one."""
    monkeypatch.setattr("cifar_dist.utils.log.log.propagate", True)
    evaluate(run)
    stored = read_run(run)
    assert stored.evaluation is not None
    assert stored.predictions is not None
    path = run / "recipe.yaml"
    train(path, "name=other", "run.seed=1", cwd=tmp_path)
    for name in ("checkpoints", "summary.json"):
        if (run / name).is_dir():
            shutil.rmtree(run / name)
            shutil.copytree(tmp_path / "runs/other" / name, run / name)
        else:
            shutil.copy(tmp_path / "runs/other" / name, run / name)
    stale = read_run(run)
    assert stale.evaluation is None
    assert stale.predictions is None
    assert load_trained_model(run).evaluation is None
    assert "other weights than the run's made it" in caplog.text
    assert "weights is" in caplog.text


def test_a_folder_that_starts_at_step_0_sets_old_results_aside(run: Path, tmp_path: Path) -> None:
    evaluate(run)
    before = {path: path.read_bytes() for path in (run / "evaluation").iterdir()}
    predictions = (run / "predictions.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").write_text("{}")
    output = train(run / "recipe.yaml", cwd=tmp_path)
    assert "starts at step 0; the results of an earlier run are now in" in output
    aside = run / "previous_1"
    assert (aside / "predictions.safetensors").read_bytes() == predictions
    assert all((aside / "evaluation" / p.name).read_bytes() == data for p, data in before.items())
    assert not (run / "evaluation").exists()
    assert read_run(run).is_finished


# ----------------------------------------------------------------------------- teachers


@pytest.fixture
def reordered(tmp_path: Path) -> Path:
    """The small data with its classes in another order."""
    train_split, test_split, meta = small_data()
    names = [*meta.fine_label_names[1:], meta.fine_label_names[0]]
    path = tmp_path / "reordered"
    write_dataset(
        path, train_split, test_split, replace(meta, fine_label_names=names), content="other"
    )
    return path


def student(recipe: RecipeMaker, **sections: Any) -> Path:
    return recipe("student", run={"epochs": 1}, averaging=None, **with_teachers("tiny"), **sections)


def test_teacher_with_its_classes_in_another_order_is_refused(
    tmp_path: Path, recipe: RecipeMaker, reordered: Path
) -> None:
    train(recipe(run={"epochs": 1}, data={"path": str(reordered)}), cwd=tmp_path)
    output = train(student(recipe), cwd=tmp_path, expect=2)
    assert output.count("error: teacher.run=runs/tiny: was trained on other classes") == 1
    ranks = Launch(
        "cache_logits",
        [student(recipe), "teacher.placement=cached", "augment.views=1"],
        cwd=tmp_path,
    )
    assert ranks.wait() == [2]
    assert "was trained on other classes" in ranks.output


def test_teacher_on_other_images_of_the_same_classes_is_a_warning(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path
) -> None:
    train(
        recipe(run={"epochs": 1, "batch_size": 100}, data={"path": str(middle_data)}), cwd=tmp_path
    )
    output = train(student(recipe), cwd=tmp_path)
    assert output.count("teacher runs/tiny was trained on other images of these classes") == 1
    summary = json.loads((tmp_path / "runs/tiny/summary.json").read_text())
    line = f"teacher runs/tiny: average.safetensors at step 6, top1 {summary['top1']:.2f} %"
    assert line in output
    assert "has not finished" not in output


def test_unfinished_teacher_is_a_warning(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run={"epochs": 1000}, averaging=None)
    ranks = Launch("train", [path, f"run.save_every_minutes={EVERY_STEP}"], cwd=tmp_path)
    wait_for_step(ranks, tmp_path / "runs/tiny", 2)
    ranks.kill()
    output = train(student(recipe), cwd=tmp_path)
    assert output.count("teacher runs/tiny has not finished its training") == 1


# ----------------------------------------------------------------------------- what a run took


def test_device_hours_count_the_processes_of_each_start(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    path = recipe(run={"epochs": 60, "eval_every_epochs": 60})
    ranks = Launch("train", [path], cwd=tmp_path, world_size=2)
    run = tmp_path / "runs/tiny"
    deadline = run / "metrics.jsonl"
    while not deadline.exists():
        assert all(process.is_alive() for process in ranks.processes), ranks.output
    os.kill(ranks.processes[0].pid or 0, signal.SIGUSR1)
    assert ranks.wait() == [75, 75], ranks.output
    stopped = load_progress(checkpoints(run / "checkpoints")[0])
    assert stopped["device_seconds"] == pytest.approx(2 * stopped["seconds"], rel=1e-3)
    train(path, cwd=tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    expected = summary["seconds"] + stopped["seconds"]
    assert summary["device_seconds"] == pytest.approx(expected, rel=1e-3)
    assert read_run(run).device_hours == summary["device_seconds"] / 3600


@pytest.mark.parametrize(("saved_step", "forks"), [(-1, False), (0, False), (40, True)])
def test_out_of_memory_advises_a_fork_once_the_run_has_a_checkpoint(
    saved_step: int, forks: bool
) -> None:
    state = SimpleNamespace(step=50, saved_step=saved_step)
    context, folder = DistContext(0, 1, None), Path("runs/big")
    with (
        pytest.raises(UserError) as error,
        watchdog(context, state, seconds=600, micro_batches=2, folder=folder),
    ):
        raise MemoryError
    advice = "run.micro_batches=4" + (" name=NEW --fork runs/big" if forks else "")
    assert str(error.value).endswith(f"use smaller micro-batches: {advice}")


# ----------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("optim", "epochs", "words"),
    [
        ({"warmup_epochs": 5}, 2, "optim.warmup_epochs=5 is not less than run.epochs=2"),
        ({"warmup_epochs": 5}, 6, None),
        ({"schedule": "multistep", "milestones": (2, 5, 9)}, 5, "optim.milestones: 5, 9 are not"),
        ({"schedule": "multistep", "milestones": (2, 4)}, 5, None),
        ({}, 1, None),
    ],
)
def test_schedule_that_does_not_come_to_its_point(
    optim: dict[str, Any], epochs: int, words: str | None
) -> None:
    problem = schedule_problem(OptimConfig(**optim), epochs)
    assert (words in problem) if words and problem else problem is words


def test_such_a_schedule_is_one_warning_at_the_start(tmp_path: Path, recipe: RecipeMaker) -> None:
    output = train(recipe(), "run.epochs=1", "optim.warmup_epochs=1", cwd=tmp_path, world_size=2)
    assert output.count("so the run ends within its warm-up") == 1
