"""W&B is a copy of metrics.jsonl: real offline files, decided before the start, never fatal."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from compare import lines
from conftest import RecipeMaker, TeacherMaker, taught
from PIL import Image
from ranks import free_port, train
from safetensors.torch import load_file
from wandb.proto import wandb_internal_pb2
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb_server import wandb_server

from cifar_dist.data.arrow import load_split, read_hierarchy
from cifar_dist.engine.tracking import EXTREMES, Tracker, TrackingConfig, decide_mode


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))


def test_mode_is_decided_by_key_and_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide_mode("off")[0] == "off"
    assert decide_mode("offline")[0] == "offline"
    assert decide_mode("auto") == ("off", "no API key (`wandb login`, or tracking.mode=offline)")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    assert decide_mode("auto")[0] == decide_mode("online")[0] == "offline"
    with wandb_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
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


def all_records(run: Path) -> list[Any]:
    """Everything that wandb's own offline file holds, in its order."""
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    found = []
    for content in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        found.append(record)
    return found


def rows_of(found: list[Any]) -> list[dict[str, Any]]:
    histories = [one.history.item for one in found if one.WhichOneof("record_type") == "history"]
    return [
        {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
        for items in histories
    ]


def records(run: Path) -> list[dict[str, Any]]:
    """The rows that are copies of metrics.jsonl's."""
    return [row for row in rows_of(all_records(run)) if row.keys() & {"train/epoch", "eval/epoch"}]


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
    recipe = {"name": "a", "teacher": None, "teachers": None}
    tracker.start(TrackingConfig(mode="offline"), tmp_path, recipe, {})
    assert tracker.run is not None
    wandb.teardown(exit_code=0)  # its core process is gone, as after a SIGTERM
    for step in range(3):
        tracker.log({"kind": "train", "step": step, "loss": 1.0})
    tracker.finish({"top1": 1.0})
    warnings = {id(record) for record in caplog.records if "W&B is off" in record.message}
    assert len(warnings) <= 1


def summary_of(found: list[Any]) -> dict[str, Any]:
    """The last value of each key of the summary."""
    values: dict[str, Any] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                values[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return values


def test_a_run_is_described_shown_and_its_lineage_kept(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker, data: Path
) -> None:
    teacher("wise")
    learning = taught("wise")
    path = recipe("tiny_s3", run={"seed": 3, "epochs": 1}, tracking={"mode": "offline"}, **learning)
    train(path, cwd=tmp_path)
    run = tmp_path / "runs/tiny_s3"
    found = all_records(run)
    kinds = {kind: [getattr(one, kind) for one in found if one.WhichOneof("record_type") == kind]
             for kind in ("run", "metric", "artifact")}  # fmt: skip

    (described,) = [one for one in kinds["run"] if one.config.update]
    assert (described.run_group, described.job_type) == ("tiny", "student")
    config = {item.key: json.loads(item.value_json) for item in described.config.update}
    environment = json.loads((run / "environment.json").read_text())
    assert config["optim"]["lr"] == 0.003
    assert config["environment"]["data"] == environment["data"]

    extremes = {one.name: one.summary for one in kinds["metric"] if one.name}
    assert extremes["eval/top1"].max
    assert extremes["eval/loss"].min
    assert extremes["eval/top1"].last

    summary = summary_of(found)
    finished = json.loads((run / "summary.json").read_text())
    assert summary["top1"] == finished["top1"]
    assert summary["finished"] is True

    (shown,) = [row for row in rows_of(found) if "predictions.path" in row]
    (root,) = run.glob("wandb/offline-run-*/files/")
    tables = [one for one in kinds["artifact"] if one.name.endswith("-predictions")]
    files = {entry.path: Path(entry.local_path) for entry in tables[0].manifest.contents}
    table = json.loads(files["predictions.table.json"].read_text())
    stored = load_file(run / "predictions.safetensors")
    hierarchy, images = read_hierarchy(data), load_split(data, "test").images
    assert table["columns"][:4] == ["test row", "picture", "true", "predicted"]
    assert len(table["data"]) == 23  # all rows of the small split, each once
    for row, picture, truth, predicted, _, right in table["data"]:
        assert truth == hierarchy.fine[int(stored["labels"][row])]
        assert predicted == hierarchy.fine[int(stored["logits"][row].argmax())]
        assert right == (truth == predicted)
        pixels = numpy.array(Image.open(files[picture["path"]]))
        assert (pixels == images[row].permute(1, 2, 0).numpy()).all()
    counts = json.loads((root / shown["confusion_table.path"]).read_text())["data"]
    assert sum(count for *_, count in counts) == 23
    assert sum(count for truth, said, count in counts if truth == said) == round(
        0.23 * finished["top1"]
    )

    artifacts = {one.type: one for one in kinds["artifact"]}
    assert set(artifacts) >= {"dataset", "model"}
    assert json.loads(artifacts["dataset"].metadata)["digest"] == environment["data"]
    facts = json.loads(artifacts["model"].metadata)
    assert facts["teachers"] == environment["teachers"]
    assert facts["data"] == environment["data"]
    listed = {entry.path for entry in artifacts["model"].manifest.contents}
    assert {"manifest.json", "model.safetensors", "ema.safetensors"} <= listed


def test_a_trial_of_the_documented_sweep(tmp_path: Path, recipe: RecipeMaker) -> None:
    """The command of docs/tracking.md as W&B's agent expands and starts it, with a small recipe."""
    root = Path(__file__).parents[1]
    page = (root / "docs/tracking.md").read_text()
    sweep = yaml.safe_load(page.partition("```yaml\n# sweep.yaml\n")[2].partition("```")[0])
    trial = {"args": {"optim.lr": {"value": 0.01}, "optim.weight_decay": {"value": 1e-4}}}
    assert trial["args"].keys() == sweep["parameters"].keys()
    command: list[str] = []
    for part in create_sweep_command(list(sweep["command"])):
        match part:
            case "${env}":
                command.append("/usr/bin/env")
            case "${args_no_hyphens}":
                command += create_sweep_command_args(trial)["args_no_hyphens"]
            case _:
                command.append(part)
    path = recipe(run={"epochs": 1}, tracking={"mode": "offline"}, data={"holdout": 0})
    (place,) = [place for place, part in enumerate(command) if "recipes/r18_32.yaml" in part]
    command[place] = (
        command[place]
        .replace("accelerate launch", sys.executable)
        .replace("recipes/r18_32.yaml", str(path))
        .replace("data.holdout=5000 run.epochs=30", "")  # the small data have 64 rows
    )
    environment = {"WANDB_RUN_ID": "abcd1234", "WANDB_SWEEP_ID": "sweep001"}
    environment |= {"PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs/sweep_abcd1234"
    assert (run / "wandb_id").read_text() == "abcd1234"  # also for a start without the agent
    found = all_records(run)
    described = next(one.run for one in found if one.WhichOneof("record_type") == "run")
    assert (described.run_id, described.sweep_id) == ("abcd1234", "sweep001")
    config = {item.key: json.loads(item.value_json) for item in described.config.update}
    assert (config["optim"]["lr"], config["optim"]["weight_decay"]) == (0.01, 1e-4)
    assert any(sweep["metric"]["name"] == name for name in EXTREMES)
