"""One W&B run of all that metrics.jsonl holds, read back from W&B's own offline file."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from compare import lines
from launcher import Launch, train
from wandb_records import records

from cifar_dist import sync_wandb
from cifar_dist.recipe import wandb_sync
from cifar_dist.tracking import tracker
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


def test_restarts_become_one_run_which_is_uploaded_once(
    tmp_path: Path,
    recipe: RecipeMaker,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = recipe(
        run={"epochs": 40, "eval_every_epochs": 20, "log_every_steps": 7},
        tracking={"mode": "offline"},
    )
    run = tmp_path / "runs/tiny"
    ranks = Launch("train", [path], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ranks.processes[0].pid is not None
    os.kill(ranks.processes[0].pid, signal.SIGUSR1)
    assert ranks.wait() == [75], ranks.output
    train(path, cwd=tmp_path)
    assert len(list(run.glob("wandb/offline-run-*"))) == 2

    monkeypatch.chdir(tmp_path)
    assert sync_wandb.main(["runs/tiny"]) == 0
    rows, logged = records(run), lines(run)  # of the one offline run there is now
    assert [row["step"] for row in rows] == [line["step"] for line in logged]
    for row, line in zip(rows, logged, strict=True):
        assert row[f"{line['kind']}/loss"] == pytest.approx(line["loss"])
    identity = tracker.wandb_run_id(run)
    (offline_run,) = run.glob(f"wandb/offline-run-*-{identity}")
    monkeypatch.chdir(run)  # another working directory
    assert sync_wandb.main(["."]) == 0
    monkeypatch.chdir(tmp_path)
    assert len(list(run.glob("wandb/offline-run-*"))) == 1

    more = {
        "kind": "eval",
        "step": 300,
        "epoch": 50.0,
        "loss": 1.0,
        "top1": 2.0,
    }  # of continued training
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(more) + "\n")
    capsys.readouterr()
    assert sync_wandb.main(["runs/tiny"]) == 0
    assert [row["step"] for row in records(run)] == [line["step"] for line in lines(run)]
    assert tracker.wandb_run_id(run) == identity
    (offline_run,) = run.glob(f"wandb/offline-run-*-{identity}")
    path = offline_run.relative_to(tmp_path)
    message = (
        f"not uploaded: no API key; run `wandb login`; run this again later, or `wandb sync {path}`"
    )
    assert message in capsys.readouterr().out

    taken: list[Path] = []  # by a server

    def upload(offline: Path) -> bool:
        taken.append(offline)
        return True

    monkeypatch.setattr(wandb_sync, "upload", upload)
    for _ in range(2):
        assert sync_wandb.main(["runs/tiny"]) == 0
    assert len(taken) == 1


def test_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder with records"):
        sync_wandb.main([str(tmp_path)])


@pytest.mark.parametrize("identity", ["abc/../..", "../..", "*", "", "abc/.."])
def test_run_id_with_a_path_deletes_nothing(tmp_path: Path, identity: str) -> None:
    folder = tmp_path / "wandb/offline-run-1-abc"
    folder.mkdir(parents=True)
    (tmp_path / "wandb_id").write_text(identity)
    with pytest.raises(UserError, match="is not a W&B id"):
        tracker.wandb_run_id(tmp_path)
    (tmp_path / "wandb_id").write_text("abc\n")
    assert tracker.offline_folders(tmp_path, tracker.wandb_run_id(tmp_path)) == [folder]


def test_offline_folders_refuse_an_id_with_a_path(tmp_path: Path) -> None:
    (tmp_path / "run/wandb/offline-run-1-x").mkdir(parents=True)
    with pytest.raises(UserError, match="is not a W&B id"):
        tracker.offline_folders(tmp_path / "run", "x/../..")
