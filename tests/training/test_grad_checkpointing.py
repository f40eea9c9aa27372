"""Gradient checkpointing: same bits, dropout included, and less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compare import assert_same_bits
from launcher import train
from torch import nn

from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.fault)])
def test_checkpointing_does_not_change_the_bits(
    tmp_path: Path, recipe: RecipeMaker, precision: str
) -> None:
    """With dropout and drop path; two processes with two micro-batches each."""
    model = {"backbone": "test_vit", "image_size": 64, "drop_rate": 0.1, "drop_path_rate": 0.2}
    run = {"epochs": 2, "micro_batches": 4, "precision": precision}
    for name, twice in (("once", False), ("twice", True)):
        path = recipe(name, run=run, model=model | {"grad_checkpointing": twice})
        train(path, cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/once", tmp_path / "runs/twice")


def test_checkpointing_saves_memory() -> None:
    kept = []
    for twice in (False, True):
        config = ModelConfig(
            backbone="vit_tiny_patch16_224", image_size=32, grad_checkpointing=twice
        )
        model = build_model(config, 10).train()
        saved: list[int] = []

        def pack(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(0 if isinstance(tensor, nn.Parameter) else tensor.numel())
            return tensor

        images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images)
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 5


@pytest.mark.parametrize(
    ("backbone", "reason"), [("resnet18", "BatchNorm"), ("resnet9", "no blocks")]
)
def test_unsupported_backbones_are_refused(backbone: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        build_model(ModelConfig(backbone=backbone, grad_checkpointing=True), 10)
