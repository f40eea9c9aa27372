"""Identity of this machine and its processes. Imports nothing slow."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def host_id() -> str:
    """Return the same string for all processes that see each other in /proc."""
    namespace = Path("/proc/self/ns/pid")
    pid_namespace = namespace.stat().st_ino if namespace.exists() else f"process {os.getpid()}"
    return f"{socket.gethostname()}, {pid_namespace}"


def process_start_time(pid: int) -> str | None:
    """Return when a process of this machine started, in clock ticks since boot.

    None if there is no such process or it has ended. Needs Linux's /proc.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def pid_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
