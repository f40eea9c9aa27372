"""Export a classifier as a folder that `timm.create_model("local-dir:FOLDER")` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar_dist.models.backbones import pretrained_cfg
from cifar_dist.models.classifier import Classifier, ModelConfig
from cifar_dist.models.heads import CosineHead, LinearHead
from cifar_dist.models.weights import unshared


def timm_blocker(config: ModelConfig) -> str | None:
    """Return why timm cannot build this network, or None if it can."""
    if not timm.is_model(config.backbone):
        return f"{config.backbone} is defined in cifar_dist only"
    if config.stem == "small":
        return "timm has no argument for stem: small"
    if config.whiten:
        return "timm has no whitening layer"
    if not isinstance(pretrained_cfg(config.backbone).classifier, str):
        return f"{config.backbone} has no single classifier in timm"
    return None


def as_linear(head: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight [C, F] and bias [C] of a linear layer that ranks the classes as the head does.

    A cosine head's projection, BatchNorm and class weights form one linear map, up to the length of
    the embedding. That is common to all classes of an image, so the ranking is the same, but not the
    probabilities.
    """
    if isinstance(head, LinearHead):
        return head.linear.weight, head.linear.bias
    assert isinstance(head, CosineHead), "there are two heads"
    norm, class_weight = head.norm, F.normalize(head.weight)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * gain
    return (class_weight * gain) @ head.project.weight, class_weight @ shift


def timm_state(model: Classifier, config: ModelConfig) -> dict[str, Tensor]:
    """Return the state dict of the whole network under timm's names, on the CPU."""
    layer = pretrained_cfg(config.backbone).classifier
    weight, bias = as_linear(model.head)
    with torch.device("meta"):
        whole = timm.create_model(config.backbone.partition(".")[0], num_classes=len(bias))
    # in some models the classifier is a 1x1 convolution
    weight = weight.reshape(whole.get_parameter(f"{layer}.weight").shape)
    state = dict(model.backbone.state_dict())
    state |= {f"{layer}.weight": weight, f"{layer}.bias": bias}
    return unshared(state)


def pixel_statistics(model: Classifier) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation with which the model normalizes pixels in 0 to 1."""
    std = 1 / (255 * model.preprocess.scale.double())
    mean = -model.preprocess.shift.double() * std
    return [[round(value, 6) for value in x.flatten().tolist()] for x in (mean, std)]  # type: ignore[return-value]


def timm_config(model: Classifier, config: ModelConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the content of config.json: architecture, input size, normalization, class names."""
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
    """Load the folder with timm; return its logits of normalized images, f32 [N, 3, S, S]."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return model(images)
