"""W&B: real offline files match metrics.jsonl; the mode is decided before the start; errors are not fatal."""

from __future__ import annotations

import json
import os
import shutil
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
from launcher import Launch, free_port, train
from PIL import Image
from safetensors.torch import load_file
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb_records import all_records, records, records_of, rows_of
from wandb_server import wandb_server

from cifar_dist.data.dataset import data_digest, load_split, read_hierarchy
from cifar_dist.tracking.tracker import (
    SUMMARY_AGGREGATES,
    Tracker,
    TrackingConfig,
    decide_mode,
    wandb_run_id,
)
from recipes import RecipeMaker, with_teachers, write_recipe


@pytest.fixture(scope="module", autouse=True)
def no_account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_CONFIG_DIR", str(folder / "config"))
        patch.setenv("NETRC", str(folder / "no-netrc"))
        patch.setenv("WANDB_DATA_DIR", str(folder / "staging"))
        yield


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """runs/ with a teacher trained on two ranks, its cached logits, and a student."""
    folder = tmp_path_factory.mktemp("tracked")
    grouped = {"mode": "offline", "group": "distilled"}
    common: dict[str, Any] = {
        "run": {"epochs": 1},
        "augment": {"cutout": 0, "mixup": 0, "cutmix": 0, "views": 1},
    }
    teacher_tracking = grouped | {"job_type": "teacher", "upload_weights": True}
    wise = write_recipe(folder, data, "wise", tracking=teacher_tracking, **common)
    distillation = with_teachers("wise", placement="cached")
    student = write_recipe(folder, data, "student", tracking=grouped, **common, **distillation)
    train(wise, cwd=folder, world_size=2)
    for command in ("cache_logits", "train"):
        ranks = Launch(command, [student], cwd=folder)
        assert ranks.wait() == [0], ranks.output
    return folder / "runs"


def test_mode_depends_on_key_and_server(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_wandb_commands_are_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They write ./wandb/settings. A recipe's own mode can only send less."""
    monkeypatch.chdir(tmp_path)
    with wandb_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for command, mode in ("offline", "offline"), ("disabled", "off"), ("online", "online"):
            program = [sys.executable, "-m", "wandb", command]
            subprocess.run(program, check=True, capture_output=True)
            assert decide_mode("auto")[0] == decide_mode("online")[0] == mode
            assert decide_mode("offline")[0] == ("off" if mode == "off" else "offline")
            assert decide_mode("off")[0] == "off"


SETTINGS = {  # modes: of the user, of the working directory, of the environment; the result
    "user": ("offline", None, None, "offline"),
    "working directory first": ("online", "disabled", None, "off"),
    "environment first": ("offline", "disabled", "online", "online"),
    "dryrun": (None, None, "dryrun", "offline"),
    "dryrun in a file": ("dryrun", None, None, "offline"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_files_are_read_as_wandb_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    user, local, variable, expected = SETTINGS[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_CONFIG_DIR")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    with wandb_server() as server:
        url = server.environment["WANDB_BASE_URL"]
        monkeypatch.setenv("no_proxy", server.environment["no_proxy"])
        for name, mode in (".config/wandb/settings", user), ("wandb/settings", local):
            if mode:
                (tmp_path / name).parent.mkdir(parents=True)
                (tmp_path / name).write_text(f"[default]\nmode = {mode}\nbase_url = {url}\n")
        assert decide_mode("auto")[0] == expected
    program = (
        "from wandb.sdk.wandb_setup import singleton; s = singleton().settings; "
        "print('off' if s._noop else 'offline' if s._offline else 'online')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split()[-1] == expected, done.stderr


def test_each_run_has_its_own_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A copied run folder gets another id, a moved one keeps it, and only a sweep sets one."""
    caplog.set_level("INFO")
    monkeypatch.setattr("cifar_dist.tracking.tracker.log.propagate", True)
    monkeypatch.setenv("WANDB_RUN_ID", "exported")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = wandb_run_id(tmp_path / "a")
    assert "exported" not in (first, wandb_run_id(tmp_path / "b"))
    assert "WANDB_RUN_ID=exported is ignored" in caplog.text
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    copied = wandb_run_id(tmp_path / "copy")
    assert copied != first
    assert wandb_run_id(tmp_path / "a") == first
    (tmp_path / "a").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "b")
    for _ in range(2):
        assert wandb_run_id(tmp_path / "moved") == first
        assert wandb_run_id(tmp_path / "copy") == copied
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep001")
    for name in ("trial", "second"):
        (tmp_path / name).mkdir()
    assert wandb_run_id(tmp_path / "trial") == "exported"
    assert wandb_run_id(tmp_path / "second") != "exported"


def test_offline_files_match_metrics_jsonl(tracked: Path) -> None:
    rows, logged = records(tracked / "student"), lines(tracked / "student")
    assert {line["kind"] for line in logged} == {"train", "eval"}
    assert len(rows) == len(logged)
    for row, line in zip(rows, logged, strict=True):
        assert row["step"] == line["step"]
        kind = line.pop("kind")
        assert row[f"{kind}/loss"] == pytest.approx(line["loss"])
        assert row[f"{kind}/top1"] == pytest.approx(line["top1"])


def test_unreachable_server_does_not_delay_training(tmp_path: Path, recipe: RecipeMaker) -> None:
    """With a key and a server that refuses connections, the run is offline at once and complete."""
    started = time.monotonic()
    output = train(
        recipe(run={"epochs": 1}, tracking={"mode": "online"}),
        cwd=tmp_path,
        environment={
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}",
        },
    )
    assert "W&B: offline (127.0.0.1 does not answer)" in output
    assert lines(tmp_path / "runs/tiny")[-1]["step"] == 6
    assert time.monotonic() - started < 60


def test_failing_call_switches_tracking_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setattr("cifar_dist.tracking.tracker.log.propagate", True)
    tracker = Tracker()
    recipe = {"name": "a", "run": {"seed": 0}, "data": {"path": "data", "labels": "fine"}}
    tracker.start(TrackingConfig(mode="offline"), tmp_path, recipe, {}, ())
    assert tracker.run is not None
    wandb.teardown(exit_code=0)  # its core process is gone, as after a SIGTERM
    for step in range(3):
        tracker.log({"kind": "train", "step": step, "loss": 1.0})
    tracker.finish({"top1": 1.0})
    warnings = {id(record) for record in caplog.records if "W&B is off" in record.message}
    assert len(warnings) <= 1


def summary_of(found: list[Any]) -> dict[str, Any]:
    """Return the last value of each summary key."""
    values: dict[str, Any] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                values[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return values


def test_run_has_config_summary_and_tables(tracked: Path, data: Path) -> None:
    run = tracked / "student"
    found = all_records(run)
    kinds = {kind: [getattr(one, kind) for one in found if one.WhichOneof("record_type") == kind]
             for kind in ("run", "metric", "artifact")}  # fmt: skip

    (described,) = [one for one in kinds["run"] if one.config.update]
    assert (described.run_group, described.job_type) == ("distilled", "student")
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
    for name in ("classes", "superclass_confusion_table"):
        assert f"{name}.path" in shown
    (root,) = run.glob(f"wandb/offline-run-*-{described.run_id}/files/")
    tables = [one for one in kinds["artifact"] if one.name.endswith("-predictions")]
    files = {entry.path: Path(entry.local_path) for entry in tables[0].manifest.contents}
    table = json.loads(files["predictions.table.json"].read_text())
    stored = load_file(run / "predictions.safetensors")
    hierarchy, images = read_hierarchy(data), load_split(data, "test").images
    assert table["columns"][:4] == ["test row", "image", "true", "predicted"]
    assert len(table["data"]) == 23  # all rows of the small split, each once
    for row, image, truth, predicted, _, correct in table["data"]:
        assert truth == hierarchy.fine[int(stored["labels"][row])]
        assert predicted == hierarchy.fine[int(stored["logits"][row].argmax())]
        assert correct == (truth == predicted)
        pixels = numpy.array(Image.open(files[image["path"]]))
        assert (pixels == images[row].permute(1, 2, 0).numpy()).all()
    counts = json.loads((root / shown["confusion_table.path"]).read_text())["data"]
    assert sum(count for *_, count in counts) == 23
    assert sum(count for truth, said, count in counts if truth == said) == round(
        0.23 * finished["top1"]
    )


def artifacts_of(found: list[Any]) -> dict[str, Any]:
    """Return the artifacts of an offline run by type and name, without tables."""
    logged = [one.artifact for one in found if one.WhichOneof("record_type") == "artifact"]
    return {f"{one.type} {one.name}": one for one in logged if one.type != "run_table"}


def test_teacher_cache_and_student_share_a_lineage(tracked: Path, data: Path) -> None:
    """Two W&B runs in one group, linked by the digests of their inputs."""
    names = {run: wandb_run_id(tracked / run) for run in ("wise", "student")}
    manifest = json.loads((tracked / "wise/logits/manifest.json").read_text())
    cache = f"logits-{manifest['sha256'][:12]}"
    found = {}
    for path in tracked.glob("*/wandb/offline-run-*/*.wandb"):
        content = records_of(path)
        described = next(one.run for one in content if one.WhichOneof("record_type") == "run")
        assert described.run_group == "distilled"
        assert described.job_type not in found
        found[described.job_type] = content
    made = {job: artifacts_of(content) for job, content in found.items()}
    dataset = f"dataset data-{data_digest(data)[:12]}"
    model = {run: f"model model-{names[run]}" for run in names}
    assert {job: set(one) for job, one in made.items()} == {
        "teacher": {dataset, model["wise"]},
        "student": {dataset, model["wise"], f"logits {cache}", model["student"]},
    }
    for name in {name for one in made.values() for name in one}:  # one version, for any logging run
        assert len({one[name].digest for one in made.values() if name in one}) == 1
    assert json.loads(made["student"][f"logits {cache}"].metadata) == manifest
    environment = json.loads((tracked / "student/environment.json").read_text())
    facts = json.loads(made["student"][model["student"]].metadata)
    assert (facts["data"], facts["teachers"]) == (environment["data"], environment["teachers"])
    entries = {
        run: {entry.path: entry for entry in made[job][model[run]].manifest.contents}
        for job, run in (("teacher", "wise"), ("student", "student"))
    }
    assert Path(entries["wise"]["model.safetensors"].local_path).is_file()  # upload_weights
    (saved,) = (tracked / "student/checkpoints").iterdir()
    assert {"manifest.json", "average.safetensors"} <= entries["student"].keys()
    reference = (saved / "model.safetensors").resolve().as_uri()
    assert entries["student"]["model.safetensors"].ref == reference


def test_trial_of_the_documented_sweep(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Run the command of docs/tracking.md as W&B's agent expands it, with a small recipe."""
    root = Path(__file__).parents[2]
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
    path = recipe(run={"epochs": 1}, tracking={"mode": "offline"}, data={"val_size": 0})
    (place,) = [place for place, part in enumerate(command) if "recipes/r18_32.yaml" in part]
    command[place] = (
        command[place]
        .replace("accelerate launch", sys.executable)
        .replace("recipes/r18_32.yaml", str(path))
        .replace("data.val_size=5000 run.epochs=30", "")  # the small data have 64 rows
    )
    environment = {"WANDB_RUN_ID": "abcd1234", "WANDB_SWEEP_ID": "sweep001"}
    environment |= {"PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs/sweep_abcd1234"
    assert wandb_run_id(run) == "abcd1234"  # also for a start without the agent
    found = all_records(run)
    described = next(one.run for one in found if one.WhichOneof("record_type") == "run")
    assert (described.run_id, described.sweep_id) == ("abcd1234", "sweep001")
    config = {item.key: json.loads(item.value_json) for item in described.config.update}
    assert (config["optim"]["lr"], config["optim"]["weight_decay"]) == (0.01, 1e-4)
    assert any(sweep["metric"]["name"] == name for name in SUMMARY_AGGREGATES)
