"""The run folder's lock: concurrent starts, dead holders, other machines, restarts of a job."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from cifar_dist.training import lock
from cifar_dist.training.lock import lock_holder, run_lock
from cifar_dist.utils.errors import UserError

processes = multiprocessing.get_context("fork")


def contend(folder: Path, barrier: Barrier, rounds: int, seed: int, log: Path) -> None:
    """Try to lock the folder `rounds` times, at the same time as others; log when it was held."""
    random_source = random.Random(seed)
    with log.open("a") as file:
        for number in range(rounds):
            barrier.wait(timeout=30)
            try:
                with run_lock(folder):
                    acquired = time.monotonic_ns()
                    time.sleep(random_source.random() * 0.01)
                    print(number, acquired, time.monotonic_ns(), file=file, flush=True)
                    if random_source.random() < 0.3:
                        (folder / "lock" / "999.json").touch()  # a process that tries and gives up
                        (folder / "lock" / "999.json").unlink()
            except UserError:
                pass


def test_concurrent_starts_have_one_winner(tmp_path: Path) -> None:
    """6 processes, 200 rounds: no two hold the lock at the same time, and nearly always one does."""
    workers, rounds = 6, 200
    barrier = processes.Barrier(workers)
    logs = [tmp_path / f"{worker}.txt" for worker in range(workers)]
    started = [
        processes.Process(
            daemon=True,
            target=contend,
            args=(tmp_path / "run", barrier, rounds, worker, logs[worker]),
        )
        for worker in range(workers)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    lines = [line.split() for log in logs for line in log.read_text().splitlines()]
    holds = sorted((int(acquired), int(released)) for _, acquired, released in lines)
    won = {int(number) for number, _, _ in lines}  # in a tie both may give up
    assert len(won) > 0.8 * rounds
    for (_, released), (acquired, _) in itertools.pairwise(holds):
        assert released <= acquired
    assert not (tmp_path / "run/lock").exists()


@pytest.mark.parametrize("cause", [None, ValueError])
def test_folder_created_by_the_lock_is_removed_if_empty(
    tmp_path: Path, cause: type[Exception] | None
) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there", "empty", "filled"):
        with suppress(ValueError), run_lock(tmp_path / name):
            if name == "filled":
                (tmp_path / name / "recipe.yaml").touch()
            if cause:
                raise cause
    assert {path.name for path in tmp_path.iterdir()} == {"there", "filled"}
    assert not (tmp_path / "filled/lock").exists()


@contextmanager
def holder(folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the folder's lock, with these environment variables."""
    script = (
        "import sys, pathlib\n"
        "from cifar_dist.training import lock\n"
        "lock.HEARTBEAT_SECONDS = 0.1\n"
        "with lock.run_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_live_holder_is_named_and_dead_one_is_ignored(tmp_path: Path) -> None:
    with (
        holder(tmp_path) as process,
        pytest.raises(UserError, match=rf"in use by process {process.pid} on this machine.*name="),
    ):
        run_lock(tmp_path).__enter__()
    with run_lock(tmp_path):
        assert (
            len(list((tmp_path / "lock").iterdir())) == 2
        )  # the dead holder's file is removed with ours
    assert not (tmp_path / "lock").exists()


def test_restarted_job_takes_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm ends all of a job before it restarts it, but two steps of one start exclude each other."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with holder(tmp_path, SLURM_JOB_ID="7"):
        with pytest.raises(UserError):
            run_lock(tmp_path).__enter__()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with run_lock(tmp_path):
            pass
        monkeypatch.setenv("SLURM_JOB_ID", "8")


def lock_of_another_machine(folder: Path, *, seconds_ago: float) -> Path:
    file = folder / "lock/1.json"
    file.parent.mkdir()
    file.write_text(
        json.dumps({"machine": "far", "pid": 1, "start": "5", "job": None, "restart": "0"})
    )
    os.utime(file, (time.time() - seconds_ago,) * 2)
    return file


def test_holder_on_another_machine_expires_without_heartbeat(tmp_path: Path) -> None:
    file = lock_of_another_machine(tmp_path, seconds_ago=lock.STALE_SECONDS - 5)
    with pytest.raises(UserError, match="in use by far, process 1"):
        run_lock(tmp_path).__enter__()
    os.utime(file, (time.time() - lock.STALE_SECONDS - 1,) * 2)
    with run_lock(tmp_path):
        pass


def test_rank_of_an_elastic_agent_waits_for_a_dead_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "100")
    monkeypatch.setattr(lock, "STALE_SECONDS", 2)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 2)
    lock_of_another_machine(tmp_path, seconds_ago=0)
    with run_lock(tmp_path):
        pass


def test_reader_sees_the_living_holder_and_changes_nothing(tmp_path: Path) -> None:
    assert lock_holder(tmp_path) is None
    with holder(tmp_path) as process:
        (tmp_path / "lock/0.json").touch()  # a process that waits
        assert lock_holder(tmp_path) == f"process {process.pid} on this machine"
        assert {file.name for file in (tmp_path / "lock").iterdir()} == {"0.json", "1.json"}
    assert lock_holder(tmp_path) is None  # its file is still there
    shutil.rmtree(tmp_path / "lock")
    file = lock_of_another_machine(tmp_path, seconds_ago=lock.STALE_SECONDS - 5)
    assert lock_holder(tmp_path) == "far, process 1"
    os.utime(file, (time.time() - lock.STALE_SECONDS - 1,) * 2)
    assert lock_holder(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"machine": null}'])
def test_unreadable_lock_file_holds_for_a_minute(tmp_path: Path, content: str) -> None:
    file = lock_of_another_machine(tmp_path, seconds_ago=0)
    file.write_text(content)
    with pytest.raises(UserError, match="just started"):
        run_lock(tmp_path).__enter__()
    os.utime(file, (time.time() - lock.STALE_SECONDS - 1,) * 2)
    with run_lock(tmp_path):
        pass


def test_process_that_was_taken_over_ends_without_saving(tmp_path: Path) -> None:
    """A suspended process resumes in a folder that another job has taken over."""
    with holder(tmp_path) as process:
        later = tmp_path / "lock/2.json"
        later.touch()  # a process that tries and gives up
        time.sleep(0.5)
        assert process.poll() is None
        later.write_text(json.dumps(lock._me()))
        assert process.wait(timeout=10) == 1
        assert process.stderr is not None
        assert "taken over by another job" in process.stderr.read()


def remove_the_lock(folder: Path) -> None:
    shutil.rmtree(folder / "lock")


def give_the_number_to_another_process(folder: Path) -> None:
    (folder / "lock/1.json").write_text(json.dumps(lock._me()))


@pytest.mark.parametrize("act", [remove_the_lock, give_the_number_to_another_process])
def test_process_without_its_lock_ends_without_saving(
    tmp_path: Path, act: Callable[[Path], None]
) -> None:
    with holder(tmp_path) as process:
        act(tmp_path)
        assert process.wait(timeout=10) == 1
        assert process.stderr is not None
        errors = process.stderr.read()
    assert "its lock was removed" in errors
    assert "Traceback" not in errors


def test_lock_of_another_process_is_kept(tmp_path: Path) -> None:
    """The other process got our number after our file had been removed."""
    with run_lock(tmp_path):
        (tmp_path / "lock/1.json").write_bytes(b"another's, \xff")
    assert (tmp_path / "lock/1.json").exists()


def test_process_without_its_lock_ends_with_a_closed_stderr(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        assert process.stderr is not None
        process.stderr.close()
        remove_the_lock(tmp_path)
        assert process.wait(timeout=10) == 1
        process.stderr = None


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, in which nothing can be created")
def test_uncreatable_folder_is_one_sentence() -> None:
    with (
        pytest.raises(UserError, match="cannot be created"),
        run_lock(Path("/proc/absent")),
    ):
        raise AssertionError
