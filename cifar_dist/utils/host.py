"""Identity of this machine and its processes."""

from __future__ import annotations

import os
import platform
import socket
import sys
from pathlib import Path

import torch


def host_id() -> str:
    """The same word for processes that find each other in /proc."""
    spaces = Path("/proc/self/ns/pid")
    alone = f"process {os.getpid()}"
    return f"{socket.gethostname()}, {spaces.stat().st_ino if spaces.exists() else alone}"


def process_start_time(pid: int) -> str | None:
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


def processor_name() -> str:
    """The CPU's model as the kernel names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_reserved_bytes(device: torch.device) -> int:
    """Return the most memory that the allocator held, recordings' pools included; 0 on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: the allocator's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
