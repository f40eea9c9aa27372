"""The processor of this machine, and memory use."""

from __future__ import annotations

import platform
import sys
from contextlib import suppress
from pathlib import Path

import torch

from cifar_dist.utils.precision import is_native


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
