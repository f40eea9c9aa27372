"""A killed, stopped or moved run ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits, largest_difference, lines
from launcher import Launch, train
from restarts import EVERY_STEP, kill_and_resume, wait_for_step

from cifar_dist.distributed.context import DistContext as RankGroup
from cifar_dist.run_folder.checkpoint import (
    checkpoints,
    find_corruption,
    latest_valid,
    save_checkpoint,
)
from cifar_dist.training.metric_window import MetricWindow
from recipes import RecipeMaker


@pytest.mark.fault  # test_all_at_once kills two ranks by default
def test_two_killed_ranks_match_an_uninterrupted_run(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Two ranks poll, and so save, about once per second."""
    path = recipe(run={"epochs": 60, "eval_every_epochs": 30, "log_every_steps": 7})
    train(path, "name=straight", cwd=tmp_path, world_size=2)
    kill_and_resume(path, tmp_path, [1, 60, 120], last_step=360, world_sizes=[2])
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/killed")


@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(p, marks=pytest.mark.fault) for p in ("bf16", "fp16"))]
)
def test_killed_runs_match_uninterrupted_runs(
    tmp_path: Path, recipe: RecipeMaker, precision: str
) -> None:
    """Three kills mid-epoch (6 steps per epoch) and mid-window (5 steps per log)."""
    path = recipe(run={"precision": precision, "epochs": 8})
    train(path, "name=straight", cwd=tmp_path)
    kill_and_resume(path, tmp_path, [4, 15, 29], last_step=48)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/killed")


@pytest.mark.fault
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_twenty_kills(tmp_path: Path, recipe: RecipeMaker, precision: str, world_size: int) -> None:
    epochs = 40
    path = recipe(run={"precision": precision, "epochs": epochs})
    train(path, "name=straight", cwd=tmp_path, world_size=world_size)
    steps = sorted(random.Random(precision).sample(range(2, 6 * epochs - 40), 20))
    kill_and_resume(path, tmp_path, steps, last_step=6 * epochs, world_sizes=[world_size])
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/killed")


def stop_at(path: Path, cwd: Path, step: int, *, world_size: int, name: str) -> str:
    """Start, send SIGUSR1 to one rank after `step`, and wait until all ranks saved and exited with 75."""
    before = checkpoints(cwd / "runs" / name / "checkpoints")
    if before:  # a signal before the first new step may meet a process without a handler
        step = max(step, int(before[0].name.removeprefix("step_")) + 1)
    arguments = [path, f"name={name}", f"run.save_every_minutes={EVERY_STEP}"]
    ranks = Launch("train", arguments, cwd=cwd, world_size=world_size)
    wait_for_step(ranks, cwd / "runs" / name, step)
    pid = ranks.processes[-1].pid
    assert pid is not None
    os.kill(pid, signal.SIGUSR1)
    assert ranks.wait() == [75] * world_size, ranks.output
    assert (cwd / "runs" / name / "stopped").exists()
    return ranks.output


@pytest.mark.parametrize(
    ("number", "step", "averaging", "world_size"),
    [
        (1, 6, {"decay": 0.9}, 2),
        (4, 24, {"decay": 0.9}, 1),  # the last evaluation
        (2, 12, {"kind": "swa", "decay": 0.999, "start_epoch": 2}, 1),  # its BatchNorm refresh
    ],
)
def test_signal_stops_an_evaluation_which_is_repeated(
    tmp_path: Path,
    recipe: RecipeMaker,
    number: int,
    step: int,
    averaging: dict[str, object],
    world_size: int,
) -> None:
    """An evaluation may take longer than the time that Slurm grants."""
    path = recipe(averaging=averaging)
    train(path, "name=straight", cwd=tmp_path, world_size=world_size)
    ranks = Launch(
        "stop_in_evaluation",
        [path, "name=stopped"],
        cwd=tmp_path,
        world_size=world_size,
        environment={"STOP_IN": str(number)},
    )
    assert ranks.wait() == [75] * world_size, ranks.output
    run = tmp_path / "runs/stopped"
    assert checkpoints(run / "checkpoints")[0].name == f"step_{step:08d}"
    assert [line for line in lines(run) if line["kind"] == "eval" and line["step"] == step] == []
    train(path, "name=stopped", cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/straight", run)


def test_changing_world_size_keeps_the_bits(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Signals in the middle of epochs and of logging windows."""
    run = {"epochs": 30, "eval_every_epochs": 10, "batch_size": 16, "micro_batches": 8}
    path = recipe(run=run)  # 4 steps per epoch
    train(path, "name=straight", cwd=tmp_path)
    for world_size, step in (4, 2), (2, 25), (1, 49):
        output = stop_at(path, tmp_path, step, world_size=world_size, name="moved")
    assert "resuming from step" in output
    train(path, "name=moved", cwd=tmp_path, world_size=4)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/moved")
    summary = json.loads((tmp_path / "runs/moved/summary.json").read_text())
    assert summary["micro_batches"] == 8
    assert summary["finished"] is True


def test_open_window_sums_follow_their_micro_batches() -> None:
    """A single rank would sum the micro-batches in another order."""
    sums = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    for rank, mine in (
        (0, [[1.0, 2.0], [0.0, 0.0], [5.0, 6.0]]),
        (1, [[0.0] * 2, [3.0, 4.0], [0.0] * 2]),
    ):
        window = MetricWindow(["loss", "top1"], micro_batches=3, device=torch.device("cpu"))
        ranks = RankGroup(rank, 2, None)
        window.restore(
            names=["loss", "top1"], sums=sums, steps=3, seconds=1.0, skips=[0, 0, 3], context=ranks
        )
        assert window.sums.tolist() == mine


def test_four_then_three_processes_agree_up_to_rounding(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path
) -> None:
    path = recipe(
        run={"batch_size": 60, "micro_batches": 4, "epochs": 4},
        data={"path": str(middle_data)},
        model={"backbone": "test_vit"},  # smooth: rounding does not grow from step to step
        optim={"name": "sgd", "lr": 0.01},
    )
    train(path, "name=straight", cwd=tmp_path, world_size=4)
    stop_at(path, tmp_path, 1, world_size=4, name="moved")
    train(path, "name=moved", cwd=tmp_path, world_size=3)
    assert largest_difference(tmp_path / "runs/straight", tmp_path / "runs/moved") < 1e-5


def test_finished_run_is_not_trained_again(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe()
    train(path, cwd=tmp_path)
    before = (tmp_path / "runs/tiny/metrics.jsonl").read_bytes()
    started = time.monotonic()
    output = train(path, cwd=tmp_path)
    assert "finished, top1" in output
    assert (tmp_path / "runs/tiny/metrics.jsonl").read_bytes() == before
    assert time.monotonic() - started < 60


def test_changed_recipe_is_refused(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe()
    train(path, cwd=tmp_path)
    output = train(path, "optim.lr=0.001", "run.epochs=6", cwd=tmp_path, expect=2)
    assert output.count("error:") == 1
    assert "optim.lr: 0.003 -> 0.001" in output
    assert "run.epochs: 4 -> 6" in output
    assert "to continue from these weights add --fork runs/tiny" in output
    train(path, "run.log_every_steps=3", cwd=tmp_path)  # never a changed recipe


def test_changed_data_are_refused(tmp_path: Path, recipe: RecipeMaker, middle_data: Path) -> None:
    path = recipe()
    train(path, cwd=tmp_path)
    output = train(path, f"data.path={middle_data}", cwd=tmp_path, expect=2)
    assert "data set: " in output


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "optimizer.json", "progress.json"]
)
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "remove"])
def test_damaged_checkpoint_is_skipped_with_a_message(tmp_path: Path, name: str, harm: str) -> None:
    for step in (22, 23):
        save_checkpoint(
            tmp_path,
            step=step,
            tensors={"model": {"weight": torch.arange(float(step))}},
            optimizer={"state": {}},
            progress={"micro_batches": 2},
        )
    newest = tmp_path / "step_00000023"
    assert latest_valid(tmp_path) == newest
    harm_file(newest / name, harm)
    assert find_corruption(newest) == f"{name} is {'missing' if harm == 'remove' else 'damaged'}"
    assert latest_valid(tmp_path) == tmp_path / "step_00000022"


def harm_file(path: Path, harm: str) -> None:
    content = bytearray(path.read_bytes())
    match harm:
        case "flip":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "remove":
            path.unlink()


def test_run_without_valid_checkpoint_does_not_restart_silently(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    path = recipe()
    train(path, cwd=tmp_path)
    run = tmp_path / "runs/tiny"
    (run / "summary.json").unlink()
    newest = checkpoints(run / "checkpoints")[0]
    harm_file(newest / "model.safetensors", "flip")
    output = train(path, cwd=tmp_path, expect=2)
    assert "every checkpoint is damaged" in output
    assert "model.safetensors is damaged" in output


def test_best_validation_checkpoint_is_kept(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path
) -> None:
    path = recipe(
        run={"batch_size": 50, "epochs": 8, "keep_checkpoints": 1},
        data={"path": str(middle_data), "val_size": 100},
        optim={"lr": 0.05},
    )
    train(path, cwd=tmp_path)
    run = tmp_path / "runs/tiny"
    evals = [line for line in lines(run) if line["kind"] == "eval"]
    assert all("val_top1" in line for line in evals)
    best = max(evals, key=lambda line: (line["val_top1"], -line["step"]))
    kept = {path.name for path in checkpoints(run / "checkpoints")}
    assert kept == {f"step_{best['step']:08d}", f"step_{evals[-1]['step']:08d}"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val_top1"] == evals[-1]["val_top1"]  # the headline is the last epoch's


def test_second_job_in_a_run_folder_is_refused(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run={"epochs": 400})
    first = Launch("train", [path, f"run.save_every_minutes={EVERY_STEP}"], cwd=tmp_path)
    wait_for_step(first, tmp_path / "runs/tiny", 1)
    try:
        output = train(path, cwd=tmp_path, expect=2)
        assert "is in use by process" in output
        assert "name=" in output
    finally:
        first.kill()
    ranks = Launch("train", [path], cwd=tmp_path)  # the lock of a dead process is ignored
    deadline = time.monotonic() + 60
    while "resuming from step" not in ranks.output and time.monotonic() < deadline:
        time.sleep(0.01)
    ranks.kill()
    assert "resuming from step" in ranks.output


def test_nonfinite_loss_stops_all_ranks_with_valid_weights(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    path = recipe(optim={"name": "sgd", "lr": 1e30, "max_grad_norm": None})
    output = train(path, cwd=tmp_path, world_size=2, expect=2)
    assert output.count("error:") == 1
    assert "not finite" in output
    assert not (tmp_path / "runs/tiny/summary.json").exists()
    assert checkpoints(tmp_path / "runs/tiny/checkpoints") == []
