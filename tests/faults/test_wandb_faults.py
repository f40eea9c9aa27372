"""W&B's server does not respond or its process is killed: no row is lost and training does not wait."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

import pytest
from compare import lines
from launcher import Launch, train
from slurm_cluster import wait_until
from wandb_server import wandb_server

from cifar_dist.tracking.tracker import Tracker, TrackingConfig
from recipes import RecipeMaker

STEPS, OFF = 24, "W&B is off, the run continues without it"
RECIPE = {"name": "a", "run": {"seed": 0}, "data": {"path": "none", "labels": "fine"}}


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_silent_server_delays_a_start_by_at_most_five_seconds(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The server accepts connections and sends nothing, so the run is offline."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("cifar_dist.tracking.tracker.log.propagate", True)
    with wandb_server() as server:
        server.deaf.set()
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        seconds = []
        for mode in ("offline", "offline", "online"):  # the first also imports wandb
            start, tracker = time.monotonic(), Tracker()
            (tmp_path / mode).mkdir(exist_ok=True)
            tracker.start(TrackingConfig(mode=mode), tmp_path / mode, RECIPE, {}, [])
            for step in range(3):
                tracker.log({"kind": "train", "step": step, "loss": 1.0})
            seconds.append(time.monotonic() - start)
            tracker.finish({"top1": 1.0})
    waited = seconds[2] - seconds[1]
    assert waited < 5, caplog.text
    offline = list(tmp_path.glob("online/wandb/offline-run-*"))
    warnings = [record for record in caplog.records if OFF in record.getMessage()]
    assert (len(offline), len({id(record) for record in warnings})) == (1, 0)
    print(f"a silent server delays a start by {waited:.1f} s")


def test_server_receives_all_rows(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Also from a server without artifacts, such as this one."""
    with wandb_server() as server:
        output = train(
            recipe(tracking={"mode": "online"}), cwd=tmp_path, environment=server.environment
        )
        assert "W&B: online" in output
        rows = [row for row in server.rows if {"train/epoch", "eval/epoch"} & row.keys()]
    logged = lines(tmp_path / "runs/tiny")
    assert OFF not in output
    assert [row["step"] for row in rows] == [line["step"] for line in logged]


def kill_wandb_of(pid: int | None) -> int:
    """Kill W&B's processes of a rank and return their number."""
    killed = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and (process / "exe").resolve().name.startswith("wandb"):
                os.kill(int(process.name), signal.SIGKILL)
                killed += 1
        except OSError:
            continue
    return killed


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["falls silent", "killed"])
def test_failure_during_a_run_loses_no_row_and_no_time(
    tmp_path: Path, recipe: RecipeMaker, kind: str
) -> None:
    """The server stops responding, or W&B's process is killed."""
    path = recipe(tracking={"mode": "online"}, run={"epochs": 60})
    train(path, "name=straight", "tracking.mode=off", cwd=tmp_path, world_size=2)
    run = tmp_path / "runs/tiny"
    with wandb_server() as server:
        ranks = Launch("train", [path], cwd=tmp_path, world_size=2, environment=server.environment)
        logged = lambda: (run / "metrics.jsonl").exists() and len(lines(run)) > 4  # noqa: E731
        wait_until(logged, seconds=120, message=lambda: ranks.output)
        if kind == "killed":
            assert kill_wandb_of(ranks.processes[0].pid) == 1, ranks.output
        else:
            server.deaf.set()
        wait_until((run / "summary.json").exists, seconds=120, message=lambda: ranks.output)
        start = time.monotonic()
        assert ranks.wait() == [0, 0], ranks.output
        waited = time.monotonic() - start
    assert lines(run) == lines(tmp_path / "runs/straight")
    assert "W&B: online" in ranks.output
    assert ranks.output.count(OFF) == 1, ranks.output
    reason = "stopped answering" if kind == "falls silent" else "Connection"
    assert reason in ranks.output.partition(OFF)[2], ranks.output
    assert "Traceback" not in ranks.output
    print(f"{kind}: the end waits {waited:.1f} s")
    assert waited < 5
