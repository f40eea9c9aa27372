"""Floor 1. The backbones of the papers about CIFAR and distillation, which timm lacks, by name.

`resnet{depth}x{width}`, as in resnet8x4: He et al. 2016 (arXiv 1512.03385), section 4.2, made wider
as by Tian et al. 2020 (arXiv 1910.10699). `wrn_{depth}_{width}`, as in wrn_40_2: Wide ResNets,
Zagoruyko and Komodakis 2016 (arXiv 1605.07146). Both have a 3x3 stem that keeps the resolution, three
stages that halve it twice, and a mean over what is left: float [B,3,S,S] -> [B, 64 * width].
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from cifar_dist.utils.errors import UserError

# Those that papers use; any other depth and width of the pattern is built as well.
PUBLISHED = (
    *(f"resnet{depth}x1" for depth in (8, 14, 20, 32, 44, 56, 110)),
    *("resnet8x4", "resnet32x4"),
    *("wrn_16_1", "wrn_16_2", "wrn_16_4", "wrn_28_10", "wrn_40_1", "wrn_40_2", "wrn_40_4"),
)


def find_cifar_resnet(name: str) -> Callable[..., nn.Module] | None:
    """What builds the network of this name, or None for a name of another kind.

    It takes `drop_rate` where the network has dropout. UserError for a depth that cannot be.
    """
    families = (("resnet{}x{}", resnet, 2), ("wrn_{}_{}", wide_resnet, 4))
    for pattern, build, extra in families:
        found = re.fullmatch(pattern.format(r"([1-9]\d{0,3})", r"([1-9]\d?)"), name)
        if found is None:
            continue
        depth, width = int(found[1]), int(found[2])
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
    """6 * blocks + 2 layers; stages of 16, 32 and 64 channels, times `width`.

    The stem has 16 channels up to width 2, and half of the first stage's from there on, as in
    Tian et al.'s code. Shortcuts that change the shape are 1x1 convolutions there as well, where
    He et al. pad with zeros.
    """
    stem = max(16, 8 * width)
    return init_weights(
        stem=conv(3, in_chans, stem),
        norm=nn.BatchNorm2d(stem),
        relu=nn.ReLU(),
        stages=three_stages(BasicBlock, stem, blocks, width),
    )


def wide_resnet(blocks: int, width: int, drop_rate: float = 0.0, in_chans: int = 3) -> nn.Module:
    """6 * blocks + 4 layers; a stem of 16 channels, stages of 16, 32 and 64, times `width`."""
    return init_weights(
        stem=conv(3, in_chans, 16),
        stages=three_stages(partial(WideBlock, drop_rate=drop_rate), 16, blocks, width),
        norm=nn.BatchNorm2d(64 * width),
        relu=nn.ReLU(),
    )


class BasicBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))). He et al. 2016."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(3, before, after, stride), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = conv(3, after, after), nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()  # does nothing
        if before != after:
            self.shortcut = nn.Sequential(conv(1, before, after, stride), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(residual)))


class WideBlock(nn.Module):
    """shortcut(x) + conv(dropout(relu(norm(conv(relu(norm(x))))))). Zagoruyko and Komodakis 2016.

    A shortcut that changes the shape is a 1x1 convolution of relu(norm(x)), as in their code.
    """

    def __init__(self, before: int, after: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(before), conv(3, before, after, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(after), conv(3, after, after)
        self.drop_rate = drop_rate
        self.shortcut = None
        if before != after:
            self.shortcut = conv(1, before, after, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        residual = F.relu(self.norm2(self.conv1(active)))
        residual = self.conv2(F.dropout(residual, self.drop_rate, self.training))
        return residual + (x if self.shortcut is None else self.shortcut(active))


def three_stages(
    block: Callable[[int, int, int], nn.Module], stem: int, blocks: int, width: int
) -> nn.Sequential:
    """Chains of blocks with 16, 32 and 64 channels times `width`, each half as large as the last."""
    stages, before = nn.Sequential(), stem
    for after, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
        first = block(before, after, stride)
        stages.append(nn.Sequential(first, *(block(after, after, 1) for _ in range(blocks - 1))))
        before = after
    return stages


def conv(kernel: int, before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)


def init_weights(**layers: nn.Module) -> nn.Sequential:
    """The layers in their order, then the mean over the pixels; weights drawn as in He et al. 2015.

    arXiv 1502.01852, by the fan-out, as both papers' code has it. Norms begin at 1 and 0.
    """
    network = nn.Sequential(OrderedDict(layers, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
