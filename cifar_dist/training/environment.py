"""Describe what a result depends on besides the recipe: environment.json."""

from __future__ import annotations

import platform
import socket
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cifar_dist
from cifar_dist.utils.host import processor_name


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe_environment(
    *,
    world_size: int,
    device: torch.device,
    data: str,
    image_size: int,
    teachers: list[str],
    origin: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return versions, hardware, commit, digests of data and teachers, image size, a fork's origin."""
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
        "commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in packages},
        "host": socket.gethostname(),
        "hardware": torch.cuda.get_device_name(device) if is_cuda else processor_name(),
        "device": device.type,
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "data": data,
        "image_size": image_size,
        "teachers": teachers,
        **({"origin": origin} if origin else {}),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def git_commit() -> str | None:
    """Return the commit of this package's checkout, with '+' if files were modified, or None."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=12"]
    try:
        result = subprocess.run([*command, "--dirty=+"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
