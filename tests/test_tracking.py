"""W&B is a copy of metrics.jsonl: real offline files, decided before the start, never fatal."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compare import lines
from conftest import RecipeMaker
from ranks import free_port, train
from wandb.proto import wandb_internal_pb2

from cifar_dist.engine.tracking import Tracker, TrackingConfig, decide_mode


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def test_mode_is_decided_by_key_and_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide_mode("off")[0] == "off"
    assert decide_mode("offline")[0] == "offline"
    assert decide_mode("auto") == ("off", "no API key (`wandb login`, or tracking.mode=offline)")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    assert decide_mode("auto")[0] == decide_mode("online")[0] == "offline"
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert decide_mode("auto")[0] == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert decide_mode("online")[0] == "off"


def log_records(file: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log behind wandb's seven bytes of header; long ones come in parts."""
    place, parts = 7, b""
    while place + 7 <= len(file):
        left_in_block = 32768 - place % 32768
        if left_in_block < 7:
            place += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", file[place : place + 7])
        parts += file[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            yield parts
            parts = b""


def records(run: Path) -> list[dict[str, Any]]:
    """The rows that wandb's own offline file holds."""
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for content in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def test_offline_files_hold_what_metrics_jsonl_holds(tmp_path: Path, recipe: RecipeMaker) -> None:
    train(recipe(tracking={"mode": "offline"}), cwd=tmp_path, world_size=2)
    run = tmp_path / "runs/tiny"
    rows = records(run)
    logged = lines(run)
    assert len(rows) == len(logged)
    for row, line in zip(rows, logged, strict=True):
        assert row["step"] == line["step"]
        kind = line.pop("kind")
        assert row[f"{kind}/loss"] == pytest.approx(line["loss"])
        assert row[f"{kind}/top1"] == pytest.approx(line["top1"])


def test_a_server_that_answers_nothing_does_not_hold_up_training(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    """A key, and a server that refuses: offline at once, and the run is whole."""
    started = time.monotonic()
    output = train(
        recipe(tracking={"mode": "online"}),
        cwd=tmp_path,
        environment={
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}",
        },
    )
    assert "W&B: offline (127.0.0.1 does not answer)" in output
    assert lines(tmp_path / "runs/tiny")[-1]["step"] == 24
    assert time.monotonic() - started < 60


def test_a_failing_call_switches_tracking_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setattr("cifar_dist.engine.tracking.log.propagate", True)
    tracker = Tracker()
    tracker.start(TrackingConfig(mode="offline"), folder=tmp_path, name="a", recipe={})
    assert tracker.run is not None
    wandb.teardown(exit_code=0)  # its core process is gone, as after a SIGTERM
    for step in range(3):
        tracker.log({"kind": "train", "step": step, "loss": 1.0})
    tracker.finish({"top1": 1.0})
    warnings = [record for record in caplog.records if "W&B is off" in record.message]
    assert len(warnings) <= 1
