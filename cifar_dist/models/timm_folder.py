"""Floor 1. A trained classifier as the folder that `timm.create_model("local-dir:FOLDER")` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar_dist.models.backbones import Classifier, ModelConfig, pretrained_cfg
from cifar_dist.models.heads import CosineHead, LinearHead


def timm_blocker(config: ModelConfig) -> str | None:
    """Why timm has no name for this network, or None where it may have one."""
    if not timm.is_model(config.backbone):
        return f"{config.backbone} is cifar_dist's own"
    if config.stem == "small":
        return "timm has no argument for stem: small"
    if config.whiten:
        return "timm has no layer that whitens"
    if not isinstance(pretrained_cfg(config.backbone).classifier, str):
        return f"{config.backbone} has no single classifier in timm"
    return None


def as_linear(head: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight [C, F] and bias [C] of one linear layer that ranks the classes as the head does.

    A linear head is that layer. A cosine head's projection, BatchNorm and class weights are one linear
    map but for the length of the embedding, which all classes of a picture share: the ranking is the
    same, the probabilities are not.
    """
    if isinstance(head, LinearHead):
        return head.linear.weight, head.linear.bias
    assert isinstance(head, CosineHead), "there are two heads"
    norm, directions = head.norm, F.normalize(head.weight)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * gain
    return (directions * gain) @ head.project.weight, directions @ shift


def timm_state(model: Classifier, config: ModelConfig) -> dict[str, Tensor]:
    """The whole network's tensors under timm's names, on the CPU."""
    layer = pretrained_cfg(config.backbone).classifier
    weight, bias = as_linear(model.head)
    with torch.device("meta"):
        whole = timm.create_model(config.backbone.partition(".")[0], num_classes=len(bias))
    # some have a 1x1 convolution
    weight = weight.reshape(whole.get_parameter(f"{layer}.weight").shape)
    state = dict(model.backbone.state_dict())
    state |= {f"{layer}.weight": weight, f"{layer}.bias": bias}
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def pixel_statistics(model: Classifier) -> tuple[list[float], list[float]]:
    """Mean and deviation that the first layer takes pixels of 0 ... 1 apart with."""
    std = 1 / (255 * model.preprocess.scale.double())
    mean = -model.preprocess.shift.double() * std
    return [[round(value, 6) for value in one.flatten().tolist()] for one in (mean, std)]  # type: ignore[return-value]


def timm_config(model: Classifier, config: ModelConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """config.json: the architecture, the pixels it expects, the classes' names."""
    mean, std = pixel_statistics(model)
    side, cfg = config.image_size, pretrained_cfg(config.backbone)
    return {
        "architecture": config.backbone.partition(".")[0],
        "num_classes": len(names),
        "label_names": list(names),
        "model_args": {"img_size": side} if cfg.fixed_input_size else {},
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": cfg.fixed_input_size,
            "interpolation": config.interpolation,
            "crop_pct": 1.0,
            "mean": mean,
            "std": std,
            "num_classes": len(names),
            "pool_size": None,
            "first_conv": cfg.first_conv,
            "classifier": cfg.classifier,
        },
    }


@torch.no_grad()
def reload_logits(folder: Path, images: Tensor) -> Tensor:
    """What timm's own loading of the folder says about normalised pixels, f32 [N, 3, S, S]."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return model(images)
