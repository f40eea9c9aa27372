"""Floor 1. From a config to a model: a backbone, its weights, its stem, and a head.

The only file that knows timm's models. A name is timm's, or else one of cifar_resnet.py or resnet9.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_dist.models.cifar_resnet import PUBLISHED, find_cifar_resnet
from cifar_dist.models.freeze import FreezeConfig
from cifar_dist.models.heads import CosineHead, LinearHead, Outputs
from cifar_dist.models.hub import fetch_weights
from cifar_dist.models.preprocess import CIFAR_MEAN, CIFAR_STD, WHITENED, Preprocess
from cifar_dist.models.resnet9 import resnet9
from cifar_dist.models.small_maps import replace_small_map_convs
from cifar_dist.models.weights import (
    State,
    load_backbone,
    load_state,
    normalization_from_config,
    read_weights,
    shapes,
    split_state,
)
from cifar_dist.utils.config import Count, Share, config
from cifar_dist.utils.errors import UserError

Color = tuple[float, float, float]  # red, green, blue of pixels in 0 ... 1


@config
class ProgressiveResize:
    """Train on smaller pictures first: `start` px, growing to image_size at epoch `epochs`."""

    start: Count
    epochs: Count
    multiple: Count = 32  # sizes are rounded to it, so the last one comes a little earlier

    def size_in(self, epoch: int, image_size: int) -> int:
        """The size to train at in an epoch, counted from 0; grows in a straight line, in steps."""
        size = self.start + (image_size - self.start) * epoch / self.epochs
        rounded = max(self.multiple, round(size / self.multiple) * self.multiple)
        return min(rounded, image_size) if epoch < self.epochs else image_size


@config
class ModelConfig:
    """Which backbone, on which pixels, with which head, from which weights."""

    backbone: str = "resnet18"
    stem: Literal["imagenet", "small"] = "imagenet"
    image_size: Count = 32
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    normalize: bool = True
    mean: Color | None = None  # None: timm's for its weights, CIFAR-100's from scratch
    std: Color | None = None
    whiten: bool = (
        False  # a fixed first layer that decorrelates 3x3 patches; for training from scratch
    )
    head: Literal["linear", "cosine"] = "linear"
    embedding_size: Count = 512  # of the cosine head
    pretrained: bool = False
    weights: str | None = None
    drop_rate: Share = 0.0
    drop_path_rate: Share = 0.0
    freeze: tuple[FreezeConfig, ...] | None = None
    grad_checkpointing: bool = False  # compute blocks twice rather than keep what is in them
    progressive_resize: ProgressiveResize | None = (
        None  # another size in the first epochs of training
    )
    mixed_resolution: Count | None = (
        None  # of one half of each micro-batch in training, chosen anew
    )

    def __post_init__(self) -> None:
        if self.progressive_resize and self.mixed_resolution:
            raise ValueError(
                "progressive_resize and mixed_resolution both set the size to train at: remove one"
            )
        if self.progressive_resize and self.progressive_resize.start > self.image_size:
            raise ValueError(
                f"progressive_resize.start is above image_size={self.image_size}: lower it"
            )
        if (
            self.progressive_resize
            and self.progressive_resize.start % self.progressive_resize.multiple
        ):
            raise ValueError(
                f"progressive_resize.start={self.progressive_resize.start} is no multiple of progressive_resize.multiple="
                f"{self.progressive_resize.multiple}, as all sizes are: change one of them"
            )
        if self.pretrained and self.weights is not None:
            raise ValueError(
                "pretrained and weights both say where the weights come from: remove one of them"
            )
        if self.whiten and (self.pretrained or self.weights is not None):
            raise ValueError(
                "whiten gives the backbone 27 channels, its weights were made for 3: remove one"
            )
        if not self.normalize and (self.mean or self.std):
            raise ValueError("mean and std need normalize: true; remove them or set it")
        if self.std and min(self.std) <= 0:
            raise ValueError("std: give three numbers above 0")

    @property
    def channels(self) -> int:
        """How many the backbone sees."""
        return WHITENED if self.whiten else 3

    def train_size(self, epoch: int) -> int:
        """The pictures' side in pixels in an epoch of training; an evaluation has image_size."""
        resize = self.progressive_resize
        return resize.size_in(epoch, self.image_size) if resize else self.image_size

    @property
    def other_sizes(self) -> list[int]:
        """At which it is trained beside image_size, ascending."""
        epochs = self.progressive_resize.epochs if self.progressive_resize else 0
        sizes = {self.train_size(epoch) for epoch in range(epochs)} | {self.mixed_resolution}
        return sorted(size for size in sizes - {self.image_size} if size)


class Classifier(nn.Module):
    """uint8 [B,3,H,W] -> Outputs: pixels, backbone, head."""

    def __init__(
        self,
        preprocess: Preprocess,
        backbone: nn.Module,
        head: nn.Module,
        mixed_resolution: int | None = None,
    ) -> None:
        super().__init__()
        self.preprocess, self.backbone, self.head = preprocess, backbone, head
        self.train_size: int | None = None  # set by who trains; an evaluation has the pixels' own
        self.mixed_resolution = mixed_resolution

    def forward(self, images: Tensor) -> Outputs:
        if self.training and self.mixed_resolution:
            features = self.features_at_two_sizes(images, self.mixed_resolution)
        else:
            size = self.train_size if self.training else None
            features = self.backbone(self.preprocess(images, size))  # [B, F]
        return self.head(features)

    def features_at_two_sizes(self, images: Tensor, mixed_resolution: int) -> Tensor:
        """Half of the pictures, by lot, at the second size; BatchNorm sees each half by itself."""
        order = torch.randperm(len(images), device=images.device)
        second, first = order.tensor_split([len(images) // 2])
        features = [
            self.backbone(self.preprocess(images.index_select(0, second), mixed_resolution)),
            self.backbone(self.preprocess(images.index_select(0, first))),
        ]
        return torch.cat(features).index_select(0, order.argsort())

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, beyond norms and biases, that timm's backbone wants undecayed."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name, _ in self.backbone.named_parameters() if name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """From a parameter's name to its layer, as timm counts the backbone's; the head is the last."""
        matcher: Any = getattr(self.backbone, "group_matcher", None)
        if matcher is None:
            raise UserError("optim.layer_decay: timm knows no layers of this backbone; remove it")
        names = [name for name, _ in self.named_parameters()]
        inner = [name.partition("backbone.")[2] for name in names]  # of the head: ""
        layers = group_with_matcher(  # what matches nothing is the last
            zip(inner, names, strict=True), matcher(coarse=coarse), return_values=True
        )
        return {name: layer for layer, inside in layers.items() for name in inside}.__getitem__


def num_parameters(model: nn.Module) -> int:
    """How many numbers the model learns or could learn; buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def build_model(config: ModelConfig, num_classes: int, state: State | None = None) -> Classifier:
    """The model that `config` describes, on the CPU, in contiguous memory, in training mode.

    `state`, a whole state dict of this very model, stands in for `pretrained` and `weights`: a
    trained model is rebuilt without the file or the network that it once started from. It may lie on
    the meta device: then the model has no numbers yet (see `shard_by_shard`).
    Raises UserError for what the backbone cannot do and for weights that do not fit.
    """
    cfg = pretrained_cfg(config.backbone)
    if state is not None:
        source, body, head_state = "the saved model", *split_state(state)
    elif config.weights is not None:
        source = f"model.weights: {config.weights}"
        file = read_weights(Path(config.weights))
        body, head_state = split_state(file)
        if config.normalize and not (config.mean and config.std):
            check_normalization(Path(config.weights), cfg, source, is_own=body is not file)
    else:
        source, body, head_state = "", None, {}

    backbone = create_backbone(config, pretrained=config.pretrained and body is None)
    if config.stem == "small":
        shrink_stem(backbone, config, body)
    if body is not None:
        load_backbone(backbone, body, cfg, source)

    if config.grad_checkpointing:
        checkpoint_blocks(backbone, config)
    replace_small_map_convs(backbone)

    from_weights = config.pretrained or config.weights is not None
    mean = config.mean or (cfg.mean if from_weights else CIFAR_MEAN)
    std = config.std or (cfg.std if from_weights else CIFAR_STD)
    if not config.normalize:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    pixels = Preprocess(config.image_size, config.interpolation, mean, std, config.whiten)
    if config.whiten and state is not None and not state["pixels.filters"].is_meta:
        pixels.filters.copy_(state["pixels.filters"])

    matrix = head_state.get({"linear": "linear.weight", "cosine": "project.weight"}[config.head])
    if matrix is not None and matrix.is_meta:  # a backbone without numbers cannot be asked
        in_features = matrix.shape[1]
    else:
        in_features = feature_dim(backbone, config)
        for other in config.other_sizes:
            feature_dim(backbone, replace(config, image_size=other))
    head: nn.Module
    match config.head:
        case "linear":
            head = LinearHead(in_features, num_classes)
        case "cosine":
            head = CosineHead(in_features, num_classes, config.embedding_size)
    if shapes(head_state) == shapes(head.state_dict()):
        load_state(head, head_state)
    elif state is not None:
        raise UserError(f"{source} has another head; check model.head and the number of classes")
    return Classifier(pixels, backbone, head, config.mixed_resolution)


def check_normalization(path: Path, cfg: Any, source: str, *, is_own: bool) -> None:
    """UserError where a file's network saw pixels otherwise than timm's weights for it, and nobody says how."""
    beside = normalization_from_config(path)
    if is_own and cfg.mean != CIFAR_MEAN:
        raise UserError(
            f"{source} is a run's own model, whose pixels timm does not know; give model.mean and "
            "model.std (see that run's recipe.yaml; where they are null and it began from scratch: "
            f"{list(CIFAR_MEAN)} and {list(CIFAR_STD)})"
        )
    if not is_own and beside and beside != (tuple(cfg.mean), tuple(cfg.std)):
        raise UserError(
            f"{source}: by the config.json beside it its pixels are not those of timm's own weights; "
            f"give model.mean={list(beside[0])} and model.std={list(beside[1])}"
        )


# ----------------------------------------------------------------------------- the backbone


def pretrained_cfg(name: str) -> Any:
    """timm's description of a backbone and its weights; UserError for a name that nobody has."""
    if not timm.is_model(name):
        if find_custom(name):
            return timm.models.PretrainedCfg(architecture=name, mean=CIFAR_MEAN, std=CIFAR_STD)
        close = difflib.get_close_matches(
            name.lower(), ["resnet9", *PUBLISHED, *timm.list_models()], n=3
        )
        hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise UserError(f"model.backbone: there is no model {name!r}; {hint}")
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:
        architecture = name.partition(".")[0]
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*")) or architecture
        raise UserError(f"model.backbone: timm has no weights {name!r}; it has: {tags}") from None
    return cfg or timm.models.PretrainedCfg()


def find_custom(name: str) -> Callable[..., nn.Module] | None:
    """What builds a network that timm lacks, or None for a name of another kind."""
    return resnet9 if name == "resnet9" else find_cifar_resnet(name)


def create_backbone(config: ModelConfig, *, pretrained: bool) -> nn.Module:
    """The network without its classifier; with timm's ImageNet weights if `pretrained`."""
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
        assert build is not None, "pretrained_cfg has refused other names"
        return build(**options)
    except TypeError as error:
        refused = next((key for key in options if f"'{key}'" in str(error)), None)
        if refused is None:
            raise
        raise UserError(
            f"model: {config.backbone} does not take {refused}; remove it or change the backbone"
        ) from None


def shrink_stem(backbone: nn.Module, config: ModelConfig, state: State | None) -> None:
    """Make the first convolution stride 1 and drop the max-pool: a 32 px picture stays 32 px.

    A ResNet from scratch gets a 3x3 kernel (He et al. 2016, section 4.2); one with weights keeps
    the kernel that its weights have. `state`: the weights, unless timm has loaded them.
    """
    if not timm.is_model(config.backbone):
        raise UserError(
            f"model.stem: {config.backbone} has a 3x3 stem at full resolution of its own; "
            "remove stem: small"
        )
    conv = getattr(backbone, "conv_stem", None) or getattr(backbone, "conv1", None)
    if isinstance(conv, nn.Sequential):  # ResNet-D: three 3x3 convolutions
        conv = conv[0]
    resnet = hasattr(backbone, "conv1") and hasattr(backbone, "maxpool")
    if not isinstance(conv, nn.Conv2d) or not (resnet or hasattr(backbone, "conv_stem")):
        raise UserError(
            f"model.stem: small is known for ResNets and EfficientNets, not for {config.backbone}; "
            "use stem: imagenet with a larger image_size"
        )
    conv.stride = (1, 1)
    if not resnet:
        return
    backbone.maxpool = nn.Identity()
    if state is None:
        fits = config.pretrained
    else:
        fits = "conv1.weight" not in state or state["conv1.weight"].shape == conv.weight.shape
    if not fits and conv is backbone.conv1:
        fresh = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(fresh.weight, mode="fan_out", nonlinearity="relu")
        backbone.conv1 = fresh


def checkpoint_blocks(backbone: nn.Module, config: ModelConfig) -> None:
    """Let the backward compute each block's inside again (Chen et al. 2016, arXiv 1604.06174)."""
    switch = getattr(backbone, "set_grad_checkpointing", None)
    if switch is None:
        raise UserError(
            f"model.grad_checkpointing: {config.backbone} has no blocks to checkpoint; remove it, or "
            "cut the batch into more micro-batches (run.micro_batches)"
        )
    if any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        raise UserError(
            f"model.grad_checkpointing: the BatchNorm of {config.backbone} would count each picture "
            "twice; remove it, or cut the batch into more micro-batches (run.micro_batches)"
        )
    switch(True)


def feature_dim(backbone: nn.Module, config: ModelConfig) -> int:
    """The width of the backbone's output, by asking it: timm's attributes tell it not for all."""
    training = backbone.training
    size = config.image_size
    try:
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(1, config.channels, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"model: {config.backbone} cannot take {size} px pictures ({reason}); "
            "choose another image_size"
        ) from error
    backbone.train(training)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise UserError(f"model: {config.backbone} gives no feature vector; choose another one")
    return features.shape[1]


def fetch_pretrained(config: ModelConfig) -> Path | None:
    """The local file of timm's weights, downloaded if need be; None unless `config.pretrained`.

    Before many processes build a model, call it on one. UserError as `fetch_weights` has it.
    """
    if not config.pretrained:
        return None
    return fetch_weights(pretrained_cfg(config.backbone), config.backbone)
