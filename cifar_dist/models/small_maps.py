"""3x3 convolutions of 1x1 and 2x2 feature maps as matrix products.

An ImageNet ResNet shrinks an image by 32, so at 32 px its last stage sees 1x1 maps: eight of the nine
kernel positions multiply only zero padding, which convolution libraries compute all the same. Output
and gradient here are the same sums without those terms.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SmallMapConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1 that skips the kernel positions that only see padding.

    Applies to 1x1 maps, and to 2x2 maps at stride 2; other sizes are convolved as usual.
    """

    def forward(self, input: Tensor) -> Tensor:
        # [out, kernel, kernel, in], the memory order of channels_last: its gradient is not copied
        weight = self.weight.permute(0, 2, 3, 1)
        match tuple(input.shape[-2:]), self.stride:
            case (1, 1), _:
                matrix = weight[:, 1, 1]  # [out, in]
            case (2, 2), (2, 2):
                matrix = weight[:, 1:, 1:].flatten(1)  # [out, 4 in]
            case _:
                return super().forward(input)
        pixels = input.permute(0, 2, 3, 1).flatten(1)  # [B, in] or [B, 4 in]
        return F.linear(pixels, matrix, self.bias)[:, :, None, None]


def replace_small_map_convs(backbone: nn.Module) -> None:
    """Make every suitable 3x3 convolution a SmallMapConv2d, in place; names and weights stay."""
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
