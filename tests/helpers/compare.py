"""Comparison of two runs: weights, averages, optimizer, and logged numbers except times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cifar_dist.run_folder.checkpoint import checkpoints, find_corruption, load_optimizer

MEASURED = ("images_per_second", "memory_bytes", "seconds")


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without measurements of time and memory."""
    parsed = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name not in MEASURED} for line in parsed]


def tensors(run: Path) -> dict[str, Tensor]:
    """Return all tensors of the newest checkpoint, and the predictions of a finished run."""
    newest = checkpoints(run / "checkpoints")[0]
    assert find_corruption(newest) is None
    loaded: dict[str, Tensor] = {}
    for path in sorted(set(newest.glob("*.safetensors")) - {newest / "optimizer.safetensors"}):
        loaded |= {f"{path.stem}.{name}": tensor for name, tensor in load_file(path).items()}
    if (run / "predictions.safetensors").exists():
        loaded |= load_file(run / "predictions.safetensors")
    optimizer = load_optimizer(newest)
    for index, state in optimizer["state"].items():
        loaded |= {
            f"optimizer.{index}.{name}": torch.as_tensor(value)
            for name, value in state.items()
            if value is not None
        }
    return loaded


def largest_difference(one: Path, other: Path) -> float:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    return max(
        float((first[name].double() - second[name].double()).abs().max())
        for name in first
        if not name.startswith("optimizer")
    )


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing, f"{len(differing)} of {len(first)} tensors differ: {differing[:5]}"
    assert lines(one) == lines(other)
