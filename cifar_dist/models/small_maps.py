"""Floor 1. 3x3 convolutions of tiny feature maps as the matrix products that they are.

ImageNet's ResNets shrink a picture by 32, so at 32 px their last stage sees 1x1 maps: eight of the
nine taps meet nothing but the border's zeros, and libraries compute them all the same. What the layer
gives, and its gradient, are the same sums without these terms.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SmallMapConv2d(nn.Conv2d):
    """A 3x3 convolution with a border of one; looks at the taps alone that meet a pixel of a 1x1 map,
    or of a 2x2 one at stride 2.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.permute(
            0, 2, 3, 1
        )  # as channels_last has it, so no gradient is copied
        match tuple(input.shape[-2:]), self.stride:
            case (1, 1), _:
                taps = weight[:, 1, 1]  # [out, in]
            case (2, 2), (2, 2):
                taps = weight[:, 1:, 1:].flatten(1)  # [out, 4 in]
            case _:
                return super().forward(input)
        pixels = input.permute(0, 2, 3, 1).flatten(1)  # [B, in] or [B, 4 in]
        return F.linear(pixels, taps, self.bias)[:, :, None, None]


def replace_small_map_convs(backbone: nn.Module) -> None:
    """Turn the convolutions that could be a TapConv2d into one, in place; names and numbers stay."""
    for module in backbone.modules():
        if (
            type(module) is nn.Conv2d
            and module.kernel_size == (3, 3)
            and module.padding == (1, 1)
            and module.dilation == (1, 1)
            and module.groups == 1
            and module.padding_mode == "zeros"
        ):
            module.__class__ = SmallMapConv2d
