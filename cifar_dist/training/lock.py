"""Lock a run folder for one job, on any file system with exclusive file creation.

The lock is a folder of numbered files, one per process that wants it. A process that sees no living
holder with a lower number, and no higher file with a name in it, writes its name and checks again. Of two
concurrent processes, the later one sees the other's name at its first check, or the other one backs off
at its second.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cifar_dist.distributed.elastic import restarts_on_failure
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import try_read_json
from cifar_dist.utils.process import host_id, pid_exists, process_start_time

HEARTBEAT_SECONDS = 15
STALE_SECONDS = 60  # age of the last heartbeat after which a file of another machine is ignored


@contextmanager
def run_lock(folder: Path, path: Path | None = None, *, remedy: str = "name=...") -> Iterator[None]:
    """Hold a folder for this process (rank 0 of its job); UserError if another process holds it.

    The lock is at `path` (default: in the folder). `remedy` is how to choose another folder. A folder that
    did not exist before is removed again if it stays empty.
    """
    path, is_new = path or folder / "lock", not folder.exists()
    own, name = _enter(path), json.dumps(_me())
    # An elastic agent starts ranks again at once, maybe before the others of the run have died.
    patience = time.monotonic() + (
        STALE_SECONDS + HEARTBEAT_SECONDS if restarts_on_failure() else 0
    )
    while (holder := _other(own)) is not None and time.monotonic() < patience:
        time.sleep(0.5)
        os.utime(own)  # ages are relative to it
    if holder is None:
        own.write_text(name)
        holder = _other(own)
    if holder is not None:
        own.unlink()
        raise UserError(
            f"{folder} is in use by {holder}; wait for it, or choose another folder ({remedy})"
        )
    stop = threading.Event()

    def beat() -> None:
        lost = False
        while not lost and not stop.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # storage does not answer; the next heartbeat may succeed
                lost = _lost(own, name)
                if not lost:
                    os.utime(own)
        if lost:
            with suppress(OSError):  # stderr may be closed
                print(
                    f"error: {folder} was taken over by another job while this one was suspended or "
                    "its storage did not answer, or its lock was removed; exiting without saving",
                    file=sys.stderr,
                    flush=True,
                )
            os._exit(1)

    thread = threading.Thread(target=beat, daemon=True, name="lock heartbeat")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with suppress(OSError):  # another process waits in it
            if not _lost(own, name):
                for file in (*_below(own), own):
                    file.unlink(missing_ok=True)
                path.rmdir()
                if is_new:
                    folder.rmdir()  # unless it is not empty


def lock_holder(folder: Path) -> str | None:
    """Return the living process that holds the lock of a run folder, as text, or None.

    Only reads: the ages of another machine's heartbeats are relative to the clock of this one.
    """
    files = [file for _, file in sorted(_numbers(folder / "lock").items()) if _read(file)]
    return next(filter(None, map(_holder, files)), None)


def _enter(path: Path) -> Path:
    """Create an empty file with the next number, exclusively."""
    for _ in range(1000):
        with suppress(FileNotFoundError):  # another process removed the folder
            path.mkdir(parents=True, exist_ok=True)
            own = path / f"{max(_numbers(path), default=0) + 1}.json"
            with suppress(FileExistsError):  # another process was faster
                own.touch(exist_ok=False)
                return own
    raise UserError(f"{path}: cannot be created; choose another path")


def _other(own: Path) -> str | None:
    """Return another living process with a lower number or a name in its file, as text."""
    for number, file in _numbers(own.parent).items():
        if number < int(own.stem) or (number > int(own.stem) and _read(file)):
            holder = _holder(file, than=own)
            if holder is not None:
                return holder
    return None


def _numbers(path: Path) -> dict[int, Path]:
    """Return the files of a lock by number; empty if it was removed."""
    try:
        matches = [re.fullmatch(r"(\d+)\.json", file.name) for file in path.iterdir()]
    except FileNotFoundError:
        return {}
    return {int(match[1]): path / match[0] for match in matches if match}


def _below(own: Path) -> list[Path]:
    return [file for number, file in _numbers(own.parent).items() if number < int(own.stem)]


def _lost(own: Path, name: str) -> bool:
    """Return whether the lock was lost: a later process considered us dead and wrote its name.

    `name` is what we wrote: after a removal, another process may have our number.
    """
    try:
        replaced = own.read_bytes() != name.encode()
    except FileNotFoundError:
        return True
    later = (n for n, file in _numbers(own.parent).items() if n > int(own.stem) and _read(file))
    return replaced or any(later)


def _me() -> dict[str, Any]:
    return {
        "machine": host_id(),
        "pid": os.getpid(),
        "start": process_start_time(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _read(file: Path) -> dict[str, Any] | None:
    """Return the owner written by `_me`, or None for any other content."""
    try:
        content = try_read_json(file) or {}
        return {name: content[name] for name in _me()} | {"pid": int(content["pid"])}
    except (ValueError, KeyError, TypeError):
        return None


def _holder(file: Path, *, than: Path | None = None) -> str | None:
    """Return the living owner of a file as text; None if dead, or an earlier start of this job.

    Ages are relative to our own new file `than` if there is one, since clocks of machines and storage
    differ.
    """
    lock, me = _read(file), _me()
    try:
        now = than.stat().st_mtime if than else time.time()
        age = now - file.stat().st_mtime
    except FileNotFoundError:
        return None  # just removed
    if lock is None:
        return "a process that has just started" if age < STALE_SECONDS else None
    if lock["job"] and lock["job"] == me["job"] and lock["restart"] != me["restart"]:
        return None  # Slurm ends a job before it restarts it
    pid, start = lock["pid"], lock["start"]
    if lock["machine"] == me["machine"]:
        alive = pid_exists(pid) if start is None else process_start_time(pid) == start
        return f"process {pid} on this machine" if alive else None
    host = str(lock["machine"]).partition(",")[0]
    return f"{host}, process {pid}" if age < STALE_SECONDS else None
