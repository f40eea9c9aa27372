"""Create backbones: any timm model, or one of cifar_resnet.py and resnet9.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_dist.models.cifar_resnet import PUBLISHED, find_cifar_resnet
from cifar_dist.models.hub import fetch_weights
from cifar_dist.models.preprocess import CIFAR_MEAN, CIFAR_STD
from cifar_dist.models.resnet9 import resnet9
from cifar_dist.models.weights import StateDict
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.suggest import closest

if TYPE_CHECKING:
    from cifar_dist.models.classifier import ModelConfig


def pretrained_cfg(name: str) -> Any:
    """Return timm's PretrainedCfg of a backbone; raise UserError for an unknown name."""
    if not timm.is_model(name):
        if find_custom(name):
            return timm.models.PretrainedCfg(architecture=name, mean=CIFAR_MEAN, std=CIFAR_STD)
        near = closest(name.lower(), ["resnet9", *PUBLISHED, *timm.list_models()])
        hint = f"did you mean {near}?" if near else "see timm.list_models()"
        raise UserError(f"model.backbone: there is no model {name!r}; {hint}")
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:
        architecture = name.partition(".")[0]
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*")) or architecture
        raise UserError(f"model.backbone: timm has no weights {name!r}; it has: {tags}") from None
    return cfg or timm.models.PretrainedCfg()


def find_custom(name: str) -> Callable[..., nn.Module] | None:
    """Return the constructor of a network that timm lacks, or None."""
    return resnet9 if name == "resnet9" else find_cifar_resnet(name)


def create_backbone(config: ModelConfig, *, pretrained: bool) -> nn.Module:
    """Return the network without its classifier, with timm's ImageNet weights if `pretrained`."""
    options: dict[str, Any] = {}
    if pretrained_cfg(config.backbone).fixed_input_size:
        options["img_size"] = config.image_size
    if config.whiten:
        options["in_chans"] = config.channels
    if config.drop_rate:
        options["drop_rate"] = config.drop_rate
    if config.drop_path_rate:
        options["drop_path_rate"] = config.drop_path_rate
    if pretrained:
        options["pretrained_cfg_overlay"] = {"file": str(fetch_pretrained(config))}
    try:
        if timm.is_model(config.backbone):
            return timm.create_model(config.backbone, pretrained, num_classes=0, **options)
        build = find_custom(config.backbone)
        assert build is not None, "pretrained_cfg refuses unknown names"
        return build(**options)
    except TypeError as error:
        unsupported = next((key for key in options if f"'{key}'" in str(error)), None)
        if unsupported is None:
            raise
        raise UserError(
            f"model: {config.backbone} does not take {unsupported}; remove it or change the backbone"
        ) from None


def shrink_stem(backbone: nn.Module, config: ModelConfig, state: StateDict | None) -> None:
    """Set the first convolution to stride 1 and drop the max-pool, so that 32 px stay 32 px.

    A ResNet trained from scratch gets a 3x3 kernel (He et al. 2016, section 4.2); with weights it
    keeps their kernel. `state` has the weights, unless timm has loaded them.
    """
    if not timm.is_model(config.backbone):
        raise UserError(
            f"model.stem: {config.backbone} already has a 3x3 stem at full resolution; "
            "remove stem: small"
        )
    conv = getattr(backbone, "conv_stem", None) or getattr(backbone, "conv1", None)
    if isinstance(conv, nn.Sequential):  # ResNet-D: three 3x3 convolutions
        conv = conv[0]
    resnet = hasattr(backbone, "conv1") and hasattr(backbone, "maxpool")
    if not isinstance(conv, nn.Conv2d) or not (resnet or hasattr(backbone, "conv_stem")):
        raise UserError(
            "model.stem: small is implemented for ResNets and EfficientNets, not for "
            f"{config.backbone}; use stem: imagenet with a larger image_size"
        )
    conv.stride = (1, 1)
    if not resnet:
        return
    backbone.maxpool = nn.Identity()
    if state is None:
        keep_kernel = config.pretrained
    else:
        weight = state.get("conv1.weight")
        keep_kernel = weight is None or weight.shape == conv.weight.shape
    if not keep_kernel and conv is backbone.conv1:
        small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
        backbone.conv1 = small


def checkpoint_blocks(backbone: nn.Module, config: ModelConfig) -> None:
    """Turn on activation checkpointing of each block (Chen et al. 2016, arXiv 1604.06174)."""
    set_grad_checkpointing = getattr(backbone, "set_grad_checkpointing", None)
    remedy = "remove it, or split the batch into more micro-batches (run.micro_batches)"
    if set_grad_checkpointing is None:
        raise UserError(
            f"model.grad_checkpointing: {config.backbone} has no blocks to checkpoint; {remedy}"
        )
    if any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        raise UserError(
            f"model.grad_checkpointing: recomputing {config.backbone} would update its BatchNorm "
            f"statistics twice per step; {remedy}"
        )
    set_grad_checkpointing(True)


def feature_dim(backbone: nn.Module, config: ModelConfig, image_size: int) -> int:
    """Return the width of the backbone's output at `image_size` px.

    Measured with a forward pass, as timm's `num_features` is wrong for some models.
    """
    training = backbone.training
    try:
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(1, config.channels, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"model: {config.backbone} cannot take {image_size} px images ({reason}); "
            "choose another image_size"
        ) from error
    backbone.train(training)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise UserError(
            f"model: {config.backbone} returns no feature vector; choose another backbone"
        )
    return features.shape[1]


def fetch_pretrained(config: ModelConfig) -> Path | None:
    """Return the local file of timm's weights, or None unless `config.pretrained`.

    Downloads the file if it is not cached: call this on one process before others build the model.
    Raises UserError as `fetch_weights` does.
    """
    if not config.pretrained:
        return None
    return fetch_weights(pretrained_cfg(config.backbone), config.backbone)
