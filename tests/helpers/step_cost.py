"""Count what a step costs: operations and waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_dist.data.augment.augmentation import AugmentConfig
from cifar_dist.data.augment.policies import AutoAugment, RandAugment, TrivialAugment
from cifar_dist.data.augment.transforms import Affine, ColorJitter, Erasing, OneOf
from cifar_dist.data.batches import Batch, BatchPlan, train_batches
from cifar_dist.data.dataset import Split
from cifar_dist.losses.base import Loss
from cifar_dist.models.classifier import ModelConfig, build_model

BATCH_SIZE = 20

CROP_FLIP = AugmentConfig(crop_padding=4, hflip=True)


ALL_OPS = AugmentConfig(
    crop_padding=4,
    hflip=True,
    vflip=True,
    affine=Affine(degrees=15),
    color_jitter=ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    auto_augment=AutoAugment(),
    rand_augment=RandAugment(),
    trivial_augment=TrivialAugment(),
    one_of=OneOf(affine=Affine(translate=0.1), erasing=Erasing(fill="mean")),
    erasing=Erasing(),
    cutout=8,
    mixup=0.2,
    cutmix=1.0,
    resizemix=(0.1, 0.8),
)


PRETENDED, GPU = FakeTensorMode(), torch.device("cuda", 7)  # one mode: constants may be kept


class Waits(TorchDispatchMode):
    """Counts host waits: numbers read and copies between devices."""

    READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.item.default,
        torch.ops.aten.nonzero.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        copied = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
        between_devices = copied and len({tensor.device for tensor in tensors}) > 1
        self.count += function in self.READS or between_devices
        return result


def batches_of(
    split: Split, *, batch_size: int = BATCH_SIZE, micro_batches: int = 2
) -> Iterator[list[Batch]]:
    return train_batches(
        split,
        torch.arange(len(split.labels)),
        BatchPlan(
            seed=0,
            shuffle=True,
            batch_size=batch_size,
            micro_batches=micro_batches,
        ),
        start_step=0,
    )


def model_of(loss: Loss) -> nn.Module:
    config = ModelConfig(backbone="test_resnet", head=loss.head or "linear", drop_rate=0.1)
    return build_model(config, 100).train()
