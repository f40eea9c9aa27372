"""Storage that is full, read-only, shared, or pulled away in the middle of a save."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits
from launcher import Ranks, train

from cifar_dist.run_folder.checkpoint import checkpoints, find_corruption, latest_valid
from cifar_dist.run_folder.records import MetricsFile
from cifar_dist.utils.files import (
    atomic_folder,
    atomic_write,
    check_writable,
    remove_folder,
    rename,
)
from recipes import RecipeMaker

EVERY_STEP = 1e-9


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 32 MiB; a checkpoint of the smallest network takes some."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command).returncode:
        pytest.skip("mounting a file system needs Linux and root")
    yield folder
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, *, free: int) -> Path:
    """Take all but `free` bytes of the disk, while others write to it."""
    rest = disk / "rest"
    with rest.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 14)):
                pass
        except OSError:
            file.truncate(file.tell() - free)
    return rest


@pytest.mark.parametrize("world_size", [2, pytest.param(1, marks=pytest.mark.fault)])
def test_a_disk_that_fills_up_costs_no_checkpoint(
    tmp_path: Path, small_disk: Path, recipe: RecipeMaker, world_size: int
) -> None:
    """One sentence with the file, on all ranks; the run goes on when there is space again."""
    path = recipe(run={"epochs": 20, "eval_every_epochs": 20, "keep_checkpoints": 1})
    arguments = [path, f"run.output_dir={small_disk}", f"run.save_every_minutes={EVERY_STEP}"]
    ranks = Ranks("train", arguments, cwd=tmp_path, world_size=world_size)
    run = small_disk / "tiny"
    deadline = time.monotonic() + 60
    while not checkpoints(run / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.01)
    rest = fill(small_disk, free=100_000)
    assert ranks.wait() == [2] * world_size, ranks.output
    assert ranks.output.count("error:") == 1, ranks.output
    assert "No space left on device; free or choose another place" in ranks.output
    assert str(run) in ranks.output
    saved = latest_valid(run / "checkpoints")
    assert saved is not None
    rest.unlink()
    assert "goes on at step" in train(*arguments, cwd=tmp_path, world_size=world_size)
    train(path, "name=straight", cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/straight", run)


@pytest.mark.fault
def test_a_disk_that_fills_up_by_metrics_cuts_no_line_that_was_complete(
    tmp_path: Path, small_disk: Path, recipe: RecipeMaker
) -> None:
    path = recipe(run={"epochs": 400, "log_every_steps": 1, "eval_every_epochs": 400})
    arguments = [path, f"run.output_dir={small_disk}"]
    ranks = Ranks("train", arguments, cwd=tmp_path, world_size=2)
    metrics = small_disk / "tiny/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    fill(small_disk, free=8192)
    assert ranks.wait() == [2, 2], ranks.output
    assert f"error: {metrics}: No space left on device" in ranks.output
    steps = [line["step"] for line in MetricsFile(metrics).read()]  # as the next start reads them
    assert steps == list(range(1, len(steps) + 1))


def test_a_read_only_folder_is_one_sentence(
    tmp_path: Path, small_disk: Path, recipe: RecipeMaker
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    output = train(recipe(), f"run.output_dir={small_disk}", cwd=tmp_path, world_size=2, expect=2)
    assert output.count("error:") == 1
    assert "Read-only file system; free or choose another place" in output


def test_all_files_have_the_modes_that_the_umask_gives(tmp_path: Path, recipe: RecipeMaker) -> None:
    """So a group can read, or go on with, what one of it has trained."""
    before = os.umask(0o027)
    try:
        process = subprocess.run(
            [sys.executable, "-m", "cifar_dist.train", str(recipe(tracking={"mode": "offline"}))],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    finally:
        os.umask(before)
    assert process.returncode == 0, process.stderr
    found = {
        path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "runs").rglob("*")
        if "wandb" not in path.parts
    }
    assert len(found) > 8
    for path, mode in found.items():
        assert mode == (0o750 if (tmp_path / path).is_dir() else 0o640), path


SAVER = """
import os, signal, sys
from pathlib import Path
import torch
from cifar_dist.run_folder.checkpoint import prune, save_checkpoint

folder, stop_at, calls = Path(sys.argv[1]), int(sys.argv[2]), 0
def count(event, arguments):
    global calls
    if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"):
        if str(folder) in str(arguments[0]):
            calls += 1
            if calls == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
weights = torch.arange(200_000.0)
sys.addaudithook(count)
for step in range(1, int(sys.argv[3]) + 1):
    save_checkpoint(
        folder, step=step, tensors={"model": {"weight": weights + step}},
        optimizer={"state": {0: {"exp_avg": weights}}}, progress={"micro_batches": 1},
    )
    prune(folder, keep=1, best=None)
    print(step, flush=True)
"""


def interrupted_save(folder: Path, *, stop_at: int, saves: int, delay: float | None) -> int:
    """Save in a process that is killed at its n-th call of the storage, or after a delay; steps said."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(folder), str(stop_at), str(saves)],
        stdout=subprocess.PIPE,
        text=True,
    )
    if delay is not None:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
    said, _ = process.communicate()
    return len(said.split()) + (delay is not None)


def check_what_a_kill_left(folder: Path, said: int) -> None:
    """The newest checkpoint is whole, and at most the one that was being written is lost."""
    found = checkpoints(folder)
    if not found:
        assert said == 0
        return
    assert [find_corruption(checkpoint) for checkpoint in found] == [None] * len(found)
    assert said <= int(found[0].name.removeprefix("step_")) <= said + 1


@pytest.mark.fault
def test_killed_at_every_call_of_the_storage(tmp_path: Path) -> None:
    """Two saves and a deletion: each open, rename and removal in turn is the last thing that happens."""
    for stop_at in range(1, 200):
        folder = tmp_path / str(stop_at)
        said = interrupted_save(folder, stop_at=stop_at, saves=2, delay=None)
        check_what_a_kill_left(folder, said)
        if said == 2:
            break
    assert said == 2
    print(f"killed at each of {stop_at} calls")
    assert stop_at > 20


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.fault)])
def test_killed_at_random_moments_inside_saves(tmp_path: Path, kills: int) -> None:
    chance = random.Random(kills)
    for number in range(kills):
        folder = tmp_path / str(number)
        said = interrupted_save(folder, stop_at=0, saves=10_000, delay=chance.random() * 0.3)
        check_what_a_kill_left(folder, said)


def test_a_rename_whose_answer_was_lost_is_done(tmp_path: Path) -> None:
    """A network file system tries again and is told that there is nothing to rename."""
    (tmp_path / "new").mkdir()
    rename(tmp_path / "old", tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        rename(tmp_path / "old", tmp_path / "nowhere")


def test_a_pipe_is_written_into_and_a_link_stays(tmp_path: Path) -> None:
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_writable(pipe)
    atomic_write(pipe, "said")
    assert os.read(reader, 100) == b"said"
    os.close(reader)
    assert pipe.is_fifo()
    target.write_text("old")
    link.symlink_to(target)
    atomic_write(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]


def test_a_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "data", os.rename
    with atomic_folder(folder) as aside:
        (aside / "a").write_text("old")

    def fail_once(old: Path, new: Path) -> None:
        if new == folder and old.name.endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        real(old, new)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(folder) as aside:
        (aside / "a").write_text("new")
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_disappears_at_once_although_a_file_in_it_cannot(tmp_path: Path) -> None:
    """Over NFS a file that somebody has open stays as .nfs...; then the folder stays, under another name."""
    folder = tmp_path / "step_00000001"
    with atomic_folder(folder) as aside:
        (aside / "a").write_text("a")
    remove_folder(folder)
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []


def test_torch_itself_can_read_what_was_saved(tmp_path: Path, recipe: RecipeMaker) -> None:
    train(recipe(run={"epochs": 1}), cwd=tmp_path)
    newest = checkpoints(tmp_path / "runs/tiny/checkpoints")[0]
    assert "state" in torch.load(newest / "optimizer.pt", weights_only=True)
