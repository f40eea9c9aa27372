"""CIFAR ResNets of the distillation literature that timm lacks: float [B, 3, S, S] -> [B, 64 * width].

`resnet{depth}x{width}`, as in resnet8x4: He et al. 2016 (arXiv 1512.03385), section 4.2, widened as
by Tian et al. 2020 (arXiv 1910.10699). `wrn_{depth}_{width}`, as in wrn_40_2: Wide ResNets, Zagoruyko
and Komodakis 2016 (arXiv 1605.07146). Both have a 3x3 stem at full resolution, three stages, of which
the second and the third halve the resolution, and global average pooling.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from cifar_dist.utils.errors import UserError

# Used in papers; any other valid depth and width is built as well.
PUBLISHED = (
    *(f"resnet{depth}x1" for depth in (8, 14, 20, 32, 44, 56, 110)),
    *("resnet8x4", "resnet32x4"),
    *("wrn_16_1", "wrn_16_2", "wrn_16_4", "wrn_28_10", "wrn_40_1", "wrn_40_2", "wrn_40_4"),
)


def find_cifar_resnet(name: str) -> Callable[..., nn.Module] | None:
    """Return the constructor of the network called `name`, or None for another kind of name.

    It takes `drop_rate` if the network has dropout. Raises UserError for an impossible depth.
    """
    families = (("resnet{}x{}", resnet, 2), ("wrn_{}_{}", wide_resnet, 4))
    for pattern, build, extra in families:
        match = re.fullmatch(pattern.format(r"([1-9]\d{0,3})", r"([1-9]\d?)"), name)
        if match is None:
            continue
        depth, width = int(match[1]), int(match[2])
        blocks = max(round((depth - extra) / 6), 1)
        nearest = 6 * blocks + extra
        if depth != nearest:
            depths = ", ".join(str(6 * count + extra) for count in range(1, 6))
            raise UserError(
                f"model.backbone: there is no {name}, depths are 6 n + {extra}: {depths}, ...; "
                f"did you mean {pattern.format(nearest, width)}?"
            )
        return partial(build, blocks, width)
    return None


def resnet(blocks: int, width: int, in_chans: int = 3) -> nn.Module:
    """Return a ResNet of 6 * blocks + 2 layers; stages of 16, 32 and 64 channels, times `width`.

    The stem has 16 channels up to width 2, and half as many as the first stage above, as in Tian et
    al.'s code. Like there, shortcuts that change the shape are 1x1 convolutions, where He et al. pad
    with zeros.
    """
    stem = max(16, 8 * width)
    return init_weights(
        stem=conv(3, in_chans, stem),
        norm=nn.BatchNorm2d(stem),
        relu=nn.ReLU(),
        stages=three_stages(BasicBlock, stem, blocks, width),
    )


def wide_resnet(blocks: int, width: int, drop_rate: float = 0.0, in_chans: int = 3) -> nn.Module:
    """Return a Wide ResNet of 6 * blocks + 4 layers; a stem of 16 channels, stages as `resnet`."""
    return init_weights(
        stem=conv(3, in_chans, 16),
        stages=three_stages(partial(WideBlock, drop_rate=drop_rate), 16, blocks, width),
        norm=nn.BatchNorm2d(64 * width),
        relu=nn.ReLU(),
    )


class BasicBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))). He et al. 2016."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(3, in_channels, channels, stride)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = conv(3, channels, channels), nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()  # identity
        if in_channels != channels:
            self.shortcut = nn.Sequential(
                conv(1, in_channels, channels, stride), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(residual)))


class WideBlock(nn.Module):
    """shortcut(x) + conv(dropout(relu(norm(conv(relu(norm(x))))))). Zagoruyko and Komodakis 2016.

    A shortcut that changes the shape is a 1x1 convolution of relu(norm(x)), as in their code.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(3, in_channels, channels, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(channels), conv(3, channels, channels)
        self.drop_rate = drop_rate
        self.shortcut = None
        if in_channels != channels:
            self.shortcut = conv(1, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        residual = F.relu(self.norm2(self.conv1(active)))
        residual = self.conv2(F.dropout(residual, self.drop_rate, self.training))
        return residual + (x if self.shortcut is None else self.shortcut(active))


def three_stages(
    block: Callable[[int, int, int], nn.Module], stem: int, blocks: int, width: int
) -> nn.Sequential:
    """Return stages of 16, 32 and 64 channels times `width`, each at half the last one's resolution."""
    stages, in_channels = nn.Sequential(), stem
    for channels, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
        first = block(in_channels, channels, stride)
        rest = (block(channels, channels, 1) for _ in range(blocks - 1))
        stages.append(nn.Sequential(first, *rest))
        in_channels = channels
    return stages


def conv(kernel: int, in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False)


def init_weights(**layers: nn.Module) -> nn.Sequential:
    """Return the layers in order, then global average pooling, with He et al. 2015 initialization.

    arXiv 1502.01852, by the fan-out, as in both papers' code. Norms start at weight 1 and bias 0.
    """
    network = nn.Sequential(OrderedDict(layers, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
