"""Single training steps."""

from __future__ import annotations

from pathlib import Path

import torch
from step_cost import batches_of
from torch import nn

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.batches import Batch
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.training.objective import Objective

CPU = torch.device("cpu")


def plain_objective(split: Split) -> Objective:
    """Return cross-entropy on images without augmentation."""
    return Objective(Augment(AugmentConfig(), split), {"cross_entropy": CrossEntropy()})


def micro_batches_of(data: Path, *, micro_batches: int, batch_size: int = 10) -> list[Batch]:
    split = load_split(data, "train")
    return next(batches_of(split, batch_size=batch_size, micro_batches=micro_batches))


def model_of(**options: object) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(**{"backbone": "test_resnet"} | options)  # type: ignore[arg-type]
    return build_model(config, 100).train()
