"""runs/NAME: one recipe, one data set, one job at a time."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cifar_dist
from cifar_dist.errors import UserError
from cifar_dist.files import write_json

HEARTBEAT_SECONDS = 15
STALE_SECONDS = 60  # a lock of another machine whose heartbeat is older is nobody's


def _process_start(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's own terms; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _pid_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _holder(path: Path) -> str | None:
    """Who holds the lock at this moment, in words, or None when it is free to take."""
    try:
        lock = json.loads(path.read_text())
        age = time.time() - path.stat().st_mtime
        host, pid, start, job = lock["host"], int(lock["pid"]), lock["start"], lock["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if job is not None and job == os.environ.get("SLURM_JOB_ID"):
        return None
    if host == socket.gethostname():
        alive = _pid_exists(pid) if start is None else _process_start(pid) == start
        return f"process {pid} on this machine" if alive and pid != os.getpid() else None
    return f"{host}, process {pid}" if age < STALE_SECONDS else None


@contextmanager
def locked(folder: Path, path: Path | None = None, *, remedy: str = "name=...") -> Iterator[None]:
    """Hold a folder for this process (rank 0 of its job), by a file with a heartbeat.

    The file is `path`, or lock.json in the folder; `remedy`: what gives a job another folder.
    """
    path = path or folder / "lock.json"
    holder = _holder(path)
    if holder is not None:
        raise UserError(
            f"{folder} is in use by {holder}; wait for it, or choose another folder ({remedy})"
        )
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": _process_start(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
    }
    write_json(path, mine)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(path)
            except OSError:
                return

    thread = threading.Thread(target=beat, daemon=True, name="lock heartbeat")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink(missing_ok=True)


def environment(
    *, world_size: int, threads: int, device: torch.device, data: str, teachers: list[str]
) -> dict[str, Any]:
    """What a result depends on beside the recipe: versions, hardware, commit, data, teachers."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = (
        "torch",
        "timm",
        "accelerate",
        "numpy",
        "pyarrow",
        "safetensors",
        "albumentations",
        "opencv-python-headless",
    )
    is_cuda = device.type == "cuda"
    return {
        "cifar_dist": cifar_dist.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in packages},
        "host": socket.gethostname(),
        "hardware": torch.cuda.get_device_name(device) if is_cuda else processor_name(),
        "device": device.type,
        "world_size": world_size,
        "threads": threads,
        "data": data,
        "teachers": teachers,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def processor_name() -> str:
    """The CPU's model as the kernel names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that this package lies in, with '+' when files differ from it."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=12"]
    try:
        answer = subprocess.run([*command, "--dirty=+"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
