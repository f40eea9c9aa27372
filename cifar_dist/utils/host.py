"""Identity of this machine and its processes, and memory use."""

from __future__ import annotations

import os
import platform
import socket
import sys
from contextlib import suppress
from pathlib import Path

import torch

from cifar_dist.utils.precision import is_native


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


def processor_name() -> str:
    """Return the model name of the CPU and its instruction set, like `AMD EPYC, AVX512 with bf16`."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    suffix = " with bf16" if is_native("bf16", torch.device("cpu")) else ""
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{suffix}"


def peak_reserved_bytes(device: torch.device) -> int:
    """Return the peak memory of the CUDA allocator, graph pools included; 0 on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of the allocated tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
