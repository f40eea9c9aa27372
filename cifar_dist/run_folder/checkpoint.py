"""State of a run on disk: model + optimizer + averages + progress.json, complete or absent.

A checkpoint is written aside, fsynced and renamed; its manifest has each file's SHA-256. What is
damaged is named and skipped. No random state, sampler or loader is saved: a run is a fold over the
step. Nothing that is read here can execute code.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import atomic_folder, remove_folder, sha256, with_path
from cifar_dist.utils.log import log

Progress = dict[str, Any]


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    optimizer: Mapping[str, Any],
    progress: Progress,
) -> Path:
    """Write `folder/step_00000600` with one safetensors file for each entry of `tensors`.

    All tensors on the CPU.
    """
    final = folder / f"step_{step:08d}"
    with atomic_folder(final) as aside:
        digests = {}

        def write(name: str, content: bytes) -> None:
            # not by the libraries, whose errors hide that the disk is full, and whose modes differ
            with with_path(final / name):
                (aside / name).write_bytes(content)
            digests[name] = hashlib.sha256(content).hexdigest()

        for name, state in tensors.items():
            write(f"{name}.safetensors", save({key: v.contiguous() for key, v in state.items()}))
        optimizer_file = io.BytesIO()
        torch.save(dict(optimizer), optimizer_file)
        write("optimizer.pt", optimizer_file.getvalue())
        write("progress.json", json.dumps({"step": step, **progress}, indent=2).encode())
        write("manifest.json", json.dumps({"sha256": digests}, indent=2).encode())
    return final


def to_cpu(value: Any) -> Any:
    """Plain data and tensors, nested, with copies of all tensors on the CPU."""
    match value:
        case Tensor():
            return value.detach().to("cpu", copy=True)
        case dict():
            return {key: to_cpu(inner) for key, inner in value.items()}
        case list():
            return [to_cpu(inner) for inner in value]
        case _:
            return value


def find_corruption(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as a short phrase, or None when every byte is right."""
    try:
        digests = json.loads((checkpoint / "manifest.json").read_text())["sha256"]
        if not isinstance(digests, dict):
            raise ValueError("sha256 is no table")
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is damaged"
    for needed in ("model.safetensors", "optimizer.pt", "progress.json"):
        if needed not in digests:
            return f"manifest.json does not list {needed}"
    for name, digest in digests.items():
        path = checkpoint / Path(name).name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} is damaged"
    return None


def digest_of(checkpoint: Path, name: str) -> str:
    """The SHA-256 of one of its files, as the manifest of a checkpoint without damage has it."""
    return json.loads((checkpoint / "manifest.json").read_text())["sha256"][name]


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first."""
    if not folder.is_dir():
        return []
    names = [path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(names, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def latest_valid(folder: Path) -> Path | None:
    """The newest checkpoint without damage; damaged ones are named in the log.

    None when there is none at all; UserError when there are some and all are damaged, since a run
    must never silently start from zero.
    """
    found = checkpoints(folder)
    reasons = []
    for checkpoint in found:
        reason = find_corruption(checkpoint)
        if reason is None:
            return checkpoint
        reasons.append(f"{checkpoint.name} ({reason})")
        log.warning(f"skipping the checkpoint {checkpoint}: {reason}")
    if found:
        raise UserError(
            f"{folder}: every checkpoint is damaged: {', '.join(reasons)}; restore one, or delete "
            "the folder to start from the beginning"
        )
    return None


def load_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The entry `name` of a checkpoint's tensors on the CPU; empty when it has none."""
    path = checkpoint / f"{name}.safetensors"
    return load_file(path) if path.exists() else {}


def load_optimizer(checkpoint: Path) -> dict[str, Any]:
    """The optimizer's state on the CPU."""
    return torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)


def load_progress(checkpoint: Path) -> Progress:
    return json.loads((checkpoint / "progress.json").read_text())


def prune(folder: Path, *, keep: int, best: str | None) -> None:
    """Delete all but the newest `keep` checkpoints and the one named `best`."""
    for checkpoint in checkpoints(folder)[keep:]:
        if checkpoint.name != best:
            remove_folder(checkpoint)
    for leftover in folder.glob(".*"):  # of a process that was killed while it wrote or deleted
        shutil.rmtree(leftover, ignore_errors=True)
