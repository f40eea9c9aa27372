"""Storage that is full or read-only, and processes that are killed during a save."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits
from launcher import Launch, train
from small_data import small_data, write_pickles

from cifar_dist.data.ingest.archive import CIFAR_100
from cifar_dist.data.ingest.preparation import prepare
from cifar_dist.distill.logit_cache import CacheWriter
from cifar_dist.exporting.formats import export
from cifar_dist.inference.trained_model import load_trained_model
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
    """Mount a file system of 32 MiB, enough for a few checkpoints of the smallest network."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command).returncode:
        pytest.skip("mounting a file system needs Linux and root")
    yield folder
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, *, free: int) -> Path:
    """Fill the disk except for `free` bytes, while other processes write to it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 14)):
                pass
        except OSError:
            file.truncate(file.tell() - free)
    return filler


@pytest.mark.parametrize("world_size", [2, pytest.param(1, marks=pytest.mark.fault)])
def test_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, small_disk: Path, recipe: RecipeMaker, world_size: int
) -> None:
    """The run ends with one sentence that names the file, and resumes when there is space again."""
    path = recipe(run={"epochs": 20, "eval_every_epochs": 20, "keep_checkpoints": 1})
    arguments = [path, f"run.output_dir={small_disk}", f"run.save_every_minutes={EVERY_STEP}"]
    ranks = Launch("train", arguments, cwd=tmp_path, world_size=world_size)
    run = small_disk / "tiny"
    deadline = time.monotonic() + 60
    while not checkpoints(run / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.01)
    filler = fill(small_disk, free=100_000)
    assert ranks.wait() == [2] * world_size, ranks.output
    assert ranks.output.count("error:") == 1, ranks.output
    assert "No space left on device; free space or choose another path" in ranks.output
    assert str(run) in ranks.output
    saved = latest_valid(run / "checkpoints")
    assert saved is not None
    filler.unlink()
    assert "resuming from step" in train(*arguments, cwd=tmp_path, world_size=world_size)
    train(path, "name=straight", cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/straight", run)


def test_prepare_on_a_full_disk_names_the_path(tmp_path: Path, small_disk: Path) -> None:
    """Both the download and the dataset; nothing but the part of the download is left."""
    write_pickles(tmp_path, *small_data())
    source = tmp_path / CIFAR_100.folder
    fill(small_disk, free=100_000)
    message = "No space left on device; free space or choose another path"
    output = small_disk / "data"
    arguments = ["--source", source, "--output", output, "--allow-unofficial"]
    ranks = Launch("cifar_dist.prepare", arguments, cwd=tmp_path)
    assert ranks.wait() == [2], ranks.output
    assert ranks.output == f"error: {output}: {message}\n"
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    handler = partial(SimpleHTTPRequestHandler, directory=str(source))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/train"
        with pytest.raises(OSError, match="No space left") as caught:
            prepare(url, output, allow_unofficial=True)
        server.shutdown()
    assert Path(caught.value.filename).name.startswith("data.")


def test_every_write_to_a_full_disk_names_the_file(
    tmp_path: Path, small_disk: Path, run: Path
) -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        atomic_write(Path("/dev/full"), "text")
    model, pt2, logits = load_trained_model(run), small_disk / "pt2", small_disk / "logits"
    fill(small_disk, free=50_000)
    with pytest.raises(OSError, match=rf"No space left on device: '{small_disk}/.*model\.pt2"):
        export(model, run, pt2, to="pt2", uint8=False)
    writer = CacheWriter(logits, (1, 1000, 100), {}, force=False)
    with pytest.raises(OSError, match=rf"No space left on device: '{logits}\.part/"):
        writer.append(torch.zeros(1000, 100))


@pytest.mark.fault
def test_full_disk_keeps_complete_lines_of_metrics(
    tmp_path: Path, small_disk: Path, recipe: RecipeMaker
) -> None:
    path = recipe(run={"epochs": 400, "log_every_steps": 1, "eval_every_epochs": 400})
    arguments = [path, f"run.output_dir={small_disk}"]
    ranks = Launch("train", arguments, cwd=tmp_path, world_size=2)
    metrics = small_disk / "tiny/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    fill(small_disk, free=8192)
    assert ranks.wait() == [2, 2], ranks.output
    assert f"error: {metrics}: No space left on device" in ranks.output
    steps = [line["step"] for line in MetricsFile(metrics).read()]
    assert steps == list(range(1, len(steps) + 1))


def test_read_only_folder_is_one_sentence(
    tmp_path: Path, small_disk: Path, recipe: RecipeMaker
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    output = train(recipe(), f"run.output_dir={small_disk}", cwd=tmp_path, world_size=2, expect=2)
    assert output.count("error:") == 1
    assert "Read-only file system; free space or choose another path" in output


def test_file_modes_follow_the_umask(tmp_path: Path, recipe: RecipeMaker) -> None:
    """A group can read a run, or resume it."""
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
    modes = {
        path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "runs").rglob("*")
        if "wandb" not in path.parts
    }
    assert len(modes) > 8
    for path, mode in modes.items():
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
    """Save in a process that is killed at its n-th storage call or after a delay in seconds.

    Returns the number of saves that are known to have finished.
    """
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
    output, _ = process.communicate()
    return len(output.split()) + (delay is not None)


def check_checkpoints(folder: Path, saves: int) -> None:
    """Assert that all checkpoints are complete and the newest is the last or the one after it."""
    left = checkpoints(folder)
    if not left:
        assert saves == 0
        return
    assert [find_corruption(checkpoint) for checkpoint in left] == [None] * len(left)
    assert saves <= int(left[0].name.removeprefix("step_")) <= saves + 1


@pytest.mark.fault
def test_kill_at_every_storage_call_loses_no_checkpoint(tmp_path: Path) -> None:
    """Two saves and a deletion, killed at each open, rename and removal in turn."""
    for stop_at in range(1, 200):
        folder = tmp_path / str(stop_at)
        saves = interrupted_save(folder, stop_at=stop_at, saves=2, delay=None)
        check_checkpoints(folder, saves)
        if saves == 2:
            break
    assert saves == 2
    print(f"killed at each of {stop_at} calls")
    assert stop_at > 20


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.fault)])
def test_kill_at_random_times_loses_no_checkpoint(tmp_path: Path, kills: int) -> None:
    random_source = random.Random(kills)
    for number in range(kills):
        folder = tmp_path / str(number)
        delay = random_source.random() * 0.3
        saves = interrupted_save(folder, stop_at=0, saves=10_000, delay=delay)
        check_checkpoints(folder, saves)


def test_rename_accepts_a_lost_reply(tmp_path: Path) -> None:
    """A network file system retries, and the second try finds nothing to rename."""
    (tmp_path / "new").mkdir()
    rename(tmp_path / "old", tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        rename(tmp_path / "old", tmp_path / "nowhere")


def test_atomic_write_into_a_pipe_and_through_a_link(tmp_path: Path) -> None:
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_writable(pipe)
    atomic_write(pipe, "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert pipe.is_fifo()
    target.write_text("old")
    link.symlink_to(target)
    atomic_write(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]


def test_folder_is_kept_if_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "data", os.rename
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("old")

    def fail_once(old: Path, new: Path) -> None:
        if new == folder and old.name.endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        real(old, new)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(folder) as temporary:
        (temporary / "a").write_text("new")
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_removed_folder_leaves_at_most_a_hidden_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over NFS a file that a process has open stays as .nfs..., so its folder stays, renamed."""
    for name in ("step_00000001", "step_00000002"):
        with atomic_folder(tmp_path / name) as temporary:
            (temporary / "a").write_text("a")
    remove_folder(tmp_path / "step_00000001")
    remove_folder(tmp_path / "step_00000001")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    remove_folder(tmp_path / "step_00000002")
    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
