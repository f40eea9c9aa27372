"""Training loops and evaluations of real networks, ours and those of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from gpu import profile_step
from input import TUTORIAL, data_works, loop_works
from measure import Conditions, Measurement, Work
from ours import BATCH_SIZE, CROP_FLIP, NullModel, constant_batch, our_loop, our_model
from peer_loops import (
    accelerate_loop,
    null_net,
    timm_loop,
    timm_net,
    torch_evaluation,
    tutorial_loop,
)
from peers import (
    TutorialDataset,
    endless,
    hugging_face_loader,
    tensor_batches,
    timm_loader,
    tutorial_loader,
)
from torch import nn
from torch.utils.data import DataLoader

from cifar_dist.data.augment.augmentation import AugmentConfig
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.distributed.context import DistContext
from cifar_dist.evaluation.evaluator import evaluate
from cifar_dist.models.classifier import ModelConfig
from cifar_dist.utils.precision import auto_precision

BATCH_224 = {"cpu": 32, "cuda": BATCH_SIZE}
CPU_EVAL_ROWS = 2_500

OURS, CONSTANT = "ours, crop and flip", "ours, on one constant batch"
EAGER = "ours, run.cuda_graphs=off"
SMALL_STEM, RESNET50 = "ours, ResNet-18 with a 3x3 stem", "ours, ResNet-50"
TIMM, TIMM_TUNED = "timm at its defaults", "timm, tuned"


def input_pipelines(conditions: Conditions) -> Measurement:
    split = load_split(conditions.data, "train", conditions.device)
    return Measurement(unit="images", turns=conditions.turns(data_works(split)), facts={})


def null_loops(conditions: Conditions) -> Measurement:
    split = load_split(conditions.data, "train", conditions.device)
    works = loop_works(split, conditions.accelerator)
    return Measurement(unit="images", turns=conditions.turns(works), facts={})


def loops_32(conditions: Conditions) -> Measurement:
    return training_loops(conditions, image_size=32, batch_size=BATCH_SIZE)


def loops_224(conditions: Conditions) -> Measurement:
    batch_size = BATCH_224[conditions.device.type]
    return training_loops(conditions, image_size=224, batch_size=batch_size)


def training_loops(conditions: Conditions, *, image_size: int, batch_size: int) -> Measurement:
    """Measure loops of one network, with peers at their defaults and tuned; the unit is an image."""
    device, accelerator = conditions.device, conditions.accelerator
    split = load_split(conditions.data, "train", device)
    config = ModelConfig(backbone=conditions.backbone, image_size=image_size)
    nets = {OURS: config, CONSTANT: config}
    if device.type == "cuda":
        nets[EAGER] = config
    if device.type == "cuda" and image_size == 32:
        nets[SMALL_STEM] = replace(config, stem="small")
    elif device.type == "cuda":
        nets[RESNET50] = replace(config, backbone="resnet50")

    def ours(name: str) -> Work:
        constant = name == CONSTANT
        return our_loop(
            split,
            our_model(device, nets[name]),
            accelerator,
            augment=AugmentConfig() if constant else CROP_FLIP,
            precision=auto_precision(device),
            batches=constant_batch(split, batch_size) if constant else None,
            batch_size=batch_size,
            cuda_graphs="off" if name == EAGER else "auto",
        )

    makers = peer_makers(split, accelerator, config, batch_size)
    makers |= {name: partial(ours, name) for name in nets}
    facts: dict[str, Any] = {"batch_size": batch_size, "precision": auto_precision(device)}
    if device.type == "cuda":
        facts["steps"] = {
            name: profile_step(make, nets.get(name), batch_size) for name, make in makers.items()
        }
    works = {name: make() for name, make in makers.items()}
    turns = conditions.turns(works, seconds=2 * conditions.seconds)
    return Measurement(unit="images", turns=turns, facts=facts)


def peer_makers(
    split: Split, accelerator: Accelerator, config: ModelConfig, batch_size: int
) -> dict[str, Callable[[], Work]]:
    device, size = accelerator.device, config.image_size

    def net() -> nn.Module:
        return timm_net(device, config.backbone)

    def tutorial() -> Work:
        return tutorial_loop(endless(tutorial_loader(split, batch_size, image_size=size)), net())

    def timm(*, augment: bool, tuned: bool) -> Work:
        loader = timm_loader(split, batch_size, device, image_size=size, augment=augment)
        return timm_loop(endless(loader), net(), tuned=tuned)

    def over_tensors() -> Work:
        batches = tensor_batches(split, batch_size, image_size=size)
        return accelerate_loop(accelerator, batches, net(), tuned=True)

    def over_datasets() -> Work:
        loader = accelerator.prepare(hugging_face_loader(split, batch_size, augment=True))
        return accelerate_loop(accelerator, endless(loader), net())

    makers: dict[str, Callable[[], Work]] = {
        TUTORIAL: tutorial,
        TIMM: partial(timm, augment=True, tuned=False),
        TIMM_TUNED: partial(timm, augment=True, tuned=True),
        "timm, tuned, --no-aug": partial(timm, augment=False, tuned=True),
        "Accelerate over tensors, tuned": over_tensors,
    }
    if size == 32:  # its transform does not resize
        makers["Accelerate, set_transform, crop and flip"] = over_datasets
    return makers


def evaluations(conditions: Conditions) -> Measurement:
    """Evaluate the test split with the network and the null model; the unit is an image."""
    device = conditions.device
    split = load_split(conditions.data, "test", device)
    rows = torch.arange(len(split.labels))
    config = ModelConfig(backbone=conditions.backbone)
    if device.type == "cpu":
        few = rows[:CPU_EVAL_ROWS]
        part = Split(images=split.images[: len(few)], labels=split.labels[: len(few)])
    else:
        few, part = rows, split

    def ours(model: nn.Module, over: torch.Tensor) -> Work:
        def evaluation() -> int:
            result = evaluate(
                model,
                split,
                over,
                precision=auto_precision(device),
                logit_scale=1.0,
                context=DistContext(0, 1, None),
            )
            return len(result.labels)

        return evaluation

    return Measurement(
        unit="images",
        turns=conditions.turns(
            {
                "network, tutorial: DataLoader, fp32": torch_evaluation(
                    ordered_loader(part), timm_net(device, conditions.backbone)
                ),
                "network, DataLoader, tuned": torch_evaluation(
                    ordered_loader(part), timm_net(device, conditions.backbone), tuned=True
                ),
                "network, ours": ours(our_model(device, config), few),
                "null model, tutorial: DataLoader": torch_evaluation(
                    ordered_loader(split), null_net(device)
                ),
                "null model, ours": ours(NullModel().to(device), rows),
            }
        ),
        facts={"rows": len(rows), "rows_through_network": len(few)},
    )


def ordered_loader(split: Split) -> DataLoader[Any]:
    """Return the tutorial's loader over all rows in order, including the last partial batch."""
    return DataLoader(TutorialDataset(split), batch_size=BATCH_SIZE)
