"""`resnet9`, a small network for 32 px that trains fast: float [B, 3, S, S], S >= 8 -> [B, 512].

Page 2019, "How to Train Your ResNet" (myrtle.ai), the DAWNBench entry for CIFAR-10: eight 3x3
convolutions, three of them followed by a max-pool, two residual blocks, and a linear layer, here
the head. Page multiplies the logits by 0.125; here the features are, which is the same for a linear
layer.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


def resnet9(in_chans: int = 3) -> nn.Module:
    """Return the network without its linear layer."""
    return nn.Sequential(
        OrderedDict(
            stem=conv_norm(in_chans, 64),
            stage1=nn.Sequential(conv_norm(64, 128), nn.MaxPool2d(2), Residual(128)),
            stage2=nn.Sequential(conv_norm(128, 256), nn.MaxPool2d(2)),
            stage3=nn.Sequential(conv_norm(256, 512), nn.MaxPool2d(2), Residual(512)),
            pool=GlobalMaxPool(),
            scale=Scale(0.125),
        )
    )


class Residual(nn.Module):
    """x + two convolutions of x, each with BatchNorm and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv_norm(channels, channels), conv_norm(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class GlobalMaxPool(nn.Module):
    """[B, C, H, W] -> [B, C]; AdaptiveMaxPool2d has no deterministic gradient on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).max(2).values


class Scale(nn.Module):
    """factor * x.

    An update changes the logits by the squared length of the head's input: unscaled maxima diverge.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def conv_norm(in_channels: int, out_channels: int) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())
