"""Save and load checkpoints: model, optimizer, averaged weights and progress.json.

A checkpoint is written to a temporary folder, fsynced and renamed, so it is complete or absent. Its
manifest holds the SHA-256 of each file; damaged checkpoints are reported and skipped. No random
state or sampler state is saved: everything random is a function of the step. Loading cannot execute
code.
"""

from __future__ import annotations

import hashlib
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
TENSOR, DTYPE = (
    "tensor",
    "dtype",
)  # the keys of {"tensor": PATH} and {"dtype": NAME} in optimizer.json
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}
REQUIRED_FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "optimizer.json",
    "progress.json",
)


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    optimizer: Mapping[str, Any],
    progress: Progress,
) -> Path:
    """Write `folder/step_00000600`, with one safetensors file per entry of `tensors`, and return it.

    All tensors must be on the CPU.
    """
    final = folder / f"step_{step:08d}"
    with atomic_folder(final) as temporary:
        digests = {}

        def write(name: str, content: bytes) -> None:
            # The libraries' own writers hide a full disk and differ in file modes.
            with with_path(final / name):
                (temporary / name).write_bytes(content)
            digests[name] = hashlib.sha256(content).hexdigest()

        moments: dict[str, Tensor] = {}
        settings = split_tensors(dict(optimizer), "", moments)
        for name, state in {**tensors, "optimizer": moments}.items():
            write(f"{name}.safetensors", save({key: v.contiguous() for key, v in state.items()}))
        write("optimizer.json", json.dumps(settings, indent=2).encode())
        write("progress.json", json.dumps({"step": step, **progress}, indent=2).encode())
        write("manifest.json", json.dumps({"sha256": digests}, indent=2).encode())
    return final


def to_cpu(value: Any) -> Any:
    """Return nested dicts and lists with all tensors copied to the CPU."""
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
    """Return a short description of what is wrong with a checkpoint, or None if it is intact."""
    try:
        digests = json.loads((checkpoint / "manifest.json").read_text())["sha256"]
        if not isinstance(digests, dict):
            raise ValueError("sha256 is not an object")
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is damaged"
    for required in REQUIRED_FILES:
        if required not in digests:
            return f"manifest.json does not list {required}"
    for name, digest in digests.items():
        path = checkpoint / Path(name).name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} is damaged"
    return None


def digest_of(checkpoint: Path, name: str) -> str:
    """Return the SHA-256 of a file from the manifest of an intact checkpoint."""
    return json.loads((checkpoint / "manifest.json").read_text())["sha256"][name]


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, newest first."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def latest_valid(folder: Path) -> Path | None:
    """Return the newest intact checkpoint, or None if there are no checkpoints.

    Damaged checkpoints are skipped with a warning. UserError if all of them are damaged, because a
    run must never silently restart from step 0.
    """
    reasons = []
    for checkpoint in checkpoints(folder):
        reason = find_corruption(checkpoint)
        if reason is None:
            return checkpoint
        reasons.append(f"{checkpoint.name} ({reason})")
        log.warning(f"skipping damaged checkpoint {checkpoint}: {reason}")
    if reasons:
        raise UserError(
            f"{folder}: every checkpoint is damaged: {', '.join(reasons)}; restore one, or delete "
            "the folder to start from step 0"
        )
    return None


def load_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors saved as `name`, on the CPU; empty if the checkpoint has none."""
    path = checkpoint / f"{name}.safetensors"
    return load_file(path) if path.exists() else {}


def split_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a nested value as JSON data; its tensors move to `tensors` under their paths."""
    match value:
        case Tensor():
            tensors[path] = value
            return {TENSOR: path}
        case torch.dtype():
            return {DTYPE: str(value).removeprefix("torch.")}
        case dict():
            return {
                str(key): split_tensors(inner, f"{path}.{key}", tensors)
                for key, inner in value.items()
            }
        case list() | tuple():
            return [
                split_tensors(inner, f"{path}.{index}", tensors)
                for index, inner in enumerate(value)
            ]
        case _:
            return value


def join_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `split_tensors`; keys that were numbers are strings."""
    match value:
        case dict() if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        case dict() if value.keys() == {DTYPE}:
            return DTYPES[value[DTYPE]]
        case dict():
            return {key: join_tensors(inner, tensors) for key, inner in value.items()}
        case list():
            return [join_tensors(inner, tensors) for inner in value]
        case _:
            return value


def load_optimizer(checkpoint: Path) -> dict[str, Any]:
    """Return the optimizer's state dict, on the CPU."""
    content = json.loads((checkpoint / "optimizer.json").read_text())
    joined = join_tensors(content, load_file(checkpoint / "optimizer.safetensors"))
    joined["state"] = {int(index): values for index, values in joined.get("state", {}).items()}
    return joined


def load_progress(checkpoint: Path) -> Progress:
    return json.loads((checkpoint / "progress.json").read_text())


def prune(folder: Path, *, keep: int, best: str | None) -> None:
    """Delete all but the newest `keep` checkpoints and the one named `best`."""
    for checkpoint in checkpoints(folder)[keep:]:
        if checkpoint.name != best:
            remove_folder(checkpoint)
    for leftover in folder.glob(".*"):  # from a process killed during a write or a deletion
        shutil.rmtree(leftover, ignore_errors=True)
