"""A folder belongs to one job at a time, on any file system that creates a file for one process only.

A lock is a folder of numbered files, each of a process that wants it. Who finds no lower one that lives,
and none that bears a name, writes its name and looks again. Of two, the one whose file came later
sees the other's name at its first look, or makes the other step back at its second.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cifar_dist.utils.errors import UserError
from cifar_dist.utils.host import _pid_exists, host_id, process_start_time

HEARTBEAT_SECONDS = 15
STALE_SECONDS = 60  # a file of another machine whose heartbeat is older is nobody's


@contextmanager
def run_lock(folder: Path, path: Path | None = None, *, remedy: str = "name=...") -> Iterator[None]:
    """Hold a folder for this process (rank 0 of its job); UserError where another holds it.

    The lock lies at `path`, or in the folder; `remedy`: what gives a job another folder. A folder that
    was not there goes again if it is still empty.
    """
    path, is_new = path or folder / "lock", not folder.exists()
    mine, name = _enter(path), json.dumps(_me())
    holder = _other(mine)
    if holder is None:
        mine.write_text(name)
        holder = _other(mine)
    if holder is not None:
        mine.unlink()
        raise UserError(
            f"{folder} is in use by {holder}; wait for it, or choose another folder ({remedy})"
        )
    stop = threading.Event()

    def beat() -> None:
        lost = False
        while not lost and not stop.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # the storage does not answer; the next one may go through
                lost = _lost(mine, name)
                if not lost:
                    os.utime(mine)
        if lost:
            with suppress(OSError):  # nobody may read it any more
                print(
                    f"error: {folder} was taken over by another job while this one was suspended or "
                    "its storage did not answer, or its lock was removed; this one ends without saving",
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
        with suppress(OSError):  # somebody else waits in it; what is left of the dead is nobody's
            if not _lost(mine, name):
                for file in (*_below(mine), mine):
                    file.unlink(missing_ok=True)
                path.rmdir()
                if is_new:
                    folder.rmdir()  # unless there is something in it


def _enter(path: Path) -> Path:
    """An empty file of our own with the next number; exclusive creation, so nobody else's."""
    for _ in range(1000):
        with suppress(FileNotFoundError):  # another removed the folder
            path.mkdir(parents=True, exist_ok=True)
            mine = path / f"{max(_numbers(path), default=0) + 1}.json"
            with suppress(FileExistsError):  # another was first
                mine.touch(exist_ok=False)
                return mine
    raise UserError(f"{path}: nothing can be made there; choose another place")


def _other(mine: Path) -> str | None:
    """Who else lives and has a lower number or has written its name, in words."""
    for number, file in _numbers(mine.parent).items():
        if number < int(mine.stem) or (number > int(mine.stem) and _read(file)):
            holder = _holder(file, than=mine)
            if holder is not None:
                return holder
    return None


def _numbers(path: Path) -> dict[int, Path]:
    """The files of a lock by their number; none where somebody removed it."""
    try:
        found = [re.fullmatch(r"(\d+)\.json", file.name) for file in path.iterdir()]
    except FileNotFoundError:
        return {}
    return {int(match[1]): path / match[0] for match in found if match}


def _below(mine: Path) -> list[Path]:
    return [file for number, file in _numbers(mine.parent).items() if number < int(mine.stem)]


def _lost(mine: Path, name: str) -> bool:
    """Whether the lock is no longer ours: a later process, which found us dead, has written its name.

    `name`: what we wrote into our file; where somebody removed the lock, another may have its number.
    """
    try:
        gone = mine.read_bytes() != name.encode()
    except FileNotFoundError:
        return True
    later = (n for n, file in _numbers(mine.parent).items() if n > int(mine.stem) and _read(file))
    return gone or any(later)


def _me() -> dict[str, Any]:
    return {
        "machine": host_id(),
        "pid": os.getpid(),
        "start": process_start_time(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _read(file: Path) -> dict[str, Any] | None:
    """What `_me` wrote; None for a file that is empty or no such thing."""
    try:
        content = json.loads(file.read_text())
        return {name: content[name] for name in _me()} | {"pid": int(content["pid"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _holder(file: Path, *, than: Path) -> str | None:
    """Who lives behind another's file, in words; None for a dead one, or an earlier start of this job.

    `than`: our own new file, which the storage's clock has just dated; machines' clocks differ.
    """
    lock, me = _read(file), _me()
    try:
        age = than.stat().st_mtime - file.stat().st_mtime
    except FileNotFoundError:
        return None  # it was removed as we looked
    if lock is None:
        return "a process that has just started" if age < STALE_SECONDS else None
    if lock["job"] and lock["job"] == me["job"] and lock["restart"] != me["restart"]:
        return None  # Slurm ends all of a job before it starts it again
    pid, start = lock["pid"], lock["start"]
    if lock["machine"] == me["machine"]:
        alive = _pid_exists(pid) if start is None else process_start_time(pid) == start
        return f"process {pid} on this machine" if alive else None
    host = str(lock["machine"]).partition(",")[0]
    return f"{host}, process {pid}" if age < STALE_SECONDS else None
