"""Build a classifier from its config: preprocessing, a backbone with its weights, and a head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from cifar_dist.models.backbones import (
    checkpoint_blocks,
    create_backbone,
    feature_dim,
    pretrained_cfg,
    shrink_stem,
)
from cifar_dist.models.freeze import FreezeConfig
from cifar_dist.models.heads import CosineHead, LinearHead, Outputs
from cifar_dist.models.preprocess import CIFAR_MEAN, CIFAR_STD, RGB, WHITENED, Preprocess
from cifar_dist.models.small_maps import replace_small_map_convs
from cifar_dist.models.weights import (
    StateDict,
    load_backbone,
    load_state,
    normalization_from_config,
    read_weights,
    shapes,
    split_state,
)
from cifar_dist.utils.config import Count, Share, config
from cifar_dist.utils.errors import UserError


@config
class ProgressiveResize:
    """Train on smaller images first: from `start` px up to image_size at epoch `epochs`."""

    start: Count  # image size in the first epoch, in pixels; a multiple of `multiple`
    epochs: Count  # epochs until image_size is reached
    multiple: Count = 32  # sizes are rounded to it, so image_size may be reached before `epochs`

    def size_in(self, epoch: int, image_size: int) -> int:
        """Return the training size of an epoch, counted from 0: linear, rounded to `multiple`."""
        size = self.start + (image_size - self.start) * epoch / self.epochs
        rounded = max(self.multiple, round(size / self.multiple) * self.multiple)
        return min(rounded, image_size) if epoch < self.epochs else image_size


@config
class ModelConfig:
    """The backbone, its input size and normalization, its head, and its initial weights."""

    backbone: str = "resnet18"  # a timm name, or resnet9, resnet8x4, wrn_40_2 and the like
    # small: first convolution with stride 1, and no max-pool after it (ResNets, EfficientNets)
    stem: Literal["imagenet", "small"] = "imagenet"
    image_size: Count = 32  # side to which the images are resized, in pixels
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # method of resizing
    normalize: bool = True  # subtract `mean` and divide by `std`
    # mean per channel of pixels in [0, 1]; null: timm's with initial weights, else CIFAR-100's
    mean: RGB | None = None
    std: RGB | None = None  # standard deviation per channel, above 0; null: like `mean`
    whiten: bool = False  # fixed first layer that decorrelates 3x3 patches; from scratch only
    # linear layer, or cosines between an embedding and the class weights
    head: Literal["linear", "cosine"] = "linear"
    embedding_size: Count = 512  # length of the embedding; cosine head only
    pretrained: bool = False  # start from timm's weights for this backbone
    weights: str | None = None  # file with the initial weights, instead of `pretrained`
    drop_rate: Share = 0.0  # dropout probability before the head; in wrn_* inside the blocks
    drop_path_rate: Share = 0.0  # highest probability of skipping a block (stochastic depth)
    freeze: tuple[FreezeConfig, ...] | None = None  # parameters to freeze; null: none
    grad_checkpointing: bool = False  # recompute blocks in the backward pass to save memory
    progressive_resize: ProgressiveResize | None = None  # train on smaller images first; null: off
    # image size in pixels of a random half of each training micro-batch; null: off
    mixed_resolution: Count | None = None

    def __post_init__(self) -> None:
        if self.progressive_resize and self.mixed_resolution:
            raise ValueError(
                "progressive_resize and mixed_resolution both set the training size: remove one"
            )
        if self.progressive_resize:
            start, multiple = self.progressive_resize.start, self.progressive_resize.multiple
            if start > self.image_size:
                raise ValueError(
                    f"progressive_resize.start is above image_size={self.image_size}: lower it"
                )
            if start % multiple:
                raise ValueError(
                    f"progressive_resize.start={start} must be a multiple of "
                    f"progressive_resize.multiple={multiple}: change one of them"
                )
        if self.pretrained and self.weights is not None:
            raise ValueError("pretrained and weights both set the initial weights: remove one")
        if self.whiten and (self.pretrained or self.weights is not None):
            raise ValueError(
                "whiten gives the backbone 27 channels, but pretrained weights take 3: remove one"
            )
        if not self.normalize and (self.mean or self.std):
            raise ValueError("mean and std require normalize: true; remove them or set it")
        if self.std and min(self.std) <= 0:
            raise ValueError("std: must be three numbers above 0")

    @property
    def channels(self) -> int:
        """Return the number of the backbone's input channels."""
        return WHITENED if self.whiten else 3

    def train_size(self, epoch: int) -> int:
        """Return the image size in pixels in a training epoch; evaluation uses image_size."""
        resize = self.progressive_resize
        return resize.size_in(epoch, self.image_size) if resize else self.image_size

    @property
    def other_sizes(self) -> list[int]:
        """Return the training sizes other than image_size, ascending."""
        epochs = self.progressive_resize.epochs if self.progressive_resize else 0
        sizes = {self.train_size(epoch) for epoch in range(epochs)} | {self.mixed_resolution}
        return sorted(size for size in sizes - {self.image_size} if size)


class Classifier(nn.Module):
    """Preprocessing, backbone and head: uint8 [B, 3, H, W] -> Outputs."""

    def __init__(
        self,
        preprocess: Preprocess,
        backbone: nn.Module,
        head: nn.Module,
        mixed_resolution: int | None = None,
    ) -> None:
        super().__init__()
        self.preprocess, self.backbone, self.head = preprocess, backbone, head
        self.train_size: int | None = None  # set by the training loop; None: preprocess.image_size
        self.mixed_resolution = mixed_resolution

    def forward(self, images: Tensor) -> Outputs:
        if self.training and self.mixed_resolution:
            features = self._features_at_two_sizes(images, self.mixed_resolution)
        else:
            size = self.train_size if self.training else None
            features = self.backbone(self.preprocess(images, size))  # [B, F]
        return self.head(features)

    def _features_at_two_sizes(self, images: Tensor, mixed_resolution: int) -> Tensor:
        """Return features with a random half of the images at `mixed_resolution`.

        The halves are two forward passes, so BatchNorm normalizes each separately.
        """
        order = torch.randperm(len(images), device=images.device)
        resized, native = order.tensor_split([len(images) // 2])
        features = [
            self.backbone(self.preprocess(images.index_select(0, resized), mixed_resolution)),
            self.backbone(self.preprocess(images.index_select(0, native))),
        ]
        return torch.cat(features).index_select(0, order.argsort())

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's backbone excludes from decay beyond norms and biases."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name, _ in self.backbone.named_parameters() if name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return a function from parameter name to timm's layer index; the head comes last."""
        matcher: Any = getattr(self.backbone, "group_matcher", None)
        if matcher is None:
            raise UserError("optim.layer_decay: timm defines no layers of this backbone; remove it")
        names = [name for name, _ in self.named_parameters()]
        inner = [name.partition("backbone.")[2] for name in names]  # "" for the head
        layers = group_with_matcher(  # names without a match go to the last layer
            zip(inner, names, strict=True), matcher(coarse=coarse), return_values=True
        )
        return {name: layer for layer, inside in layers.items() for name in inside}.__getitem__


def num_parameters(model: nn.Module) -> int:
    """Return the number of parameters, frozen ones included; buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def build_model(
    config: ModelConfig, num_classes: int, state: StateDict | None = None
) -> Classifier:
    """Return the model of `config`, on the CPU, in contiguous memory, in training mode.

    `state`, the whole state dict of such a model, replaces `pretrained` and `weights`, so that a
    trained model is rebuilt without the file that it started from. It may be on the meta device
    (see `load_sharded` in distill/teacher.py).
    Raise UserError for options that the backbone does not support and for weights that do not fit.
    """
    cfg = pretrained_cfg(config.backbone)
    source, body, head_state = _initial_state(config, cfg, state)
    backbone = create_backbone(config, pretrained=config.pretrained and body is None)
    if config.stem == "small":
        shrink_stem(backbone, config, body)
    if body is not None:
        load_backbone(backbone, body, cfg, source)
    if config.grad_checkpointing:
        checkpoint_blocks(backbone, config)
    replace_small_map_convs(backbone)

    preprocess = _build_preprocess(config, cfg)
    if config.whiten and state is not None and not state["preprocess.filters"].is_meta:
        preprocess.filters.copy_(state["preprocess.filters"])
    head = _build_head(config, _in_features(backbone, config, head_state), num_classes)
    if shapes(head_state) == shapes(head.state_dict()):
        load_state(head, head_state)
    elif state is not None:
        raise UserError(f"{source} has another head; check model.head and the number of classes")
    return Classifier(preprocess, backbone, head, config.mixed_resolution)


def _initial_state(
    config: ModelConfig, cfg: Any, state: StateDict | None
) -> tuple[str, StateDict | None, StateDict]:
    """Return (source for error messages, backbone's tensors or None, head's tensors)."""
    if state is not None:
        return "the saved model", *split_state(state)
    if config.weights is None:
        return "", None, {}
    source, path = f"model.weights: {config.weights}", Path(config.weights)
    content = read_weights(path)
    body, head_state = split_state(content)
    if config.normalize and not (config.mean and config.std):
        _check_normalization(path, cfg, source, is_classifier=body is not content)
    return source, body, head_state


def _check_normalization(path: Path, cfg: Any, source: str, *, is_classifier: bool) -> None:
    """Raise UserError if a weights file may expect another normalization than timm's `cfg`."""
    if is_classifier:
        if cfg.mean != CIFAR_MEAN:
            raise UserError(
                f"{source} is a cifar_dist model, whose normalization timm does not know; give model.mean "
                "and model.std (see recipe.yaml of its run; if they are null there and it was trained "
                f"from scratch: {list(CIFAR_MEAN)} and {list(CIFAR_STD)})"
            )
        return
    normalization = normalization_from_config(path)
    if normalization and normalization != (tuple(cfg.mean), tuple(cfg.std)):
        mean, std = normalization
        raise UserError(
            f"{source}: config.json in the same folder has another normalization than timm's weights; "
            f"give model.mean={list(mean)} and model.std={list(std)}"
        )


def _build_preprocess(config: ModelConfig, cfg: Any) -> Preprocess:
    from_weights = config.pretrained or config.weights is not None
    mean = config.mean or (cfg.mean if from_weights else CIFAR_MEAN)
    std = config.std or (cfg.std if from_weights else CIFAR_STD)
    if not config.normalize:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return Preprocess(config.image_size, config.interpolation, mean, std, config.whiten)


def _in_features(backbone: nn.Module, config: ModelConfig, head_state: StateDict) -> int:
    """Return the head's input width; check that the backbone takes every training size."""
    matrix = head_state.get({"linear": "linear.weight", "cosine": "project.weight"}[config.head])
    if matrix is not None and matrix.is_meta:  # then the backbone cannot run either
        return matrix.shape[1]
    in_features = feature_dim(backbone, config, config.image_size)
    for size in config.other_sizes:
        feature_dim(backbone, config, size)
    return in_features


def _build_head(config: ModelConfig, in_features: int, num_classes: int) -> nn.Module:
    match config.head:
        case "linear":
            return LinearHead(in_features, num_classes)
        case "cosine":
            return CosineHead(in_features, num_classes, config.embedding_size)
