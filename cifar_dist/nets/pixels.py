"""Floor 1. The model's first layer: uint8 pictures become the numbers that the backbone expects."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RGB = tuple[float, float, float]

# Of CIFAR-100's 50,000 training pictures, on the scale 0 to 1.
CIFAR_MEAN: RGB = (0.5071, 0.4865, 0.4409)
CIFAR_STD: RGB = (0.2673, 0.2564, 0.2762)


class PixelInput(nn.Module):
    """uint8 [B,3,H,W] -> float32 [B,3,S,S], channels_last: resized, then (x / 255 - mean) / std.

    Resizing is `F.interpolate` with align_corners=False, without anti-aliasing; bicubic may
    overshoot 0 to 255. Always float32: what follows decides by autocast what it computes in.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        image_size: int,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        mean: RGB = (0.0, 0.0, 0.0),
        std: RGB = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.image_size, self.interpolation = image_size, interpolation
        center = torch.tensor(mean).view(1, 3, 1, 1)
        spread = torch.tensor(std).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * spread), persistent=False)
        self.register_buffer("shift", -center / spread, persistent=False)

    def forward(self, images: Tensor, image_size: int | None = None) -> Tensor:
        """`image_size`: another S than its own, for this call."""
        side = image_size or self.image_size
        pixels = images.to(torch.float32, memory_format=torch.channels_last)
        if pixels.shape[-2:] != (side, side):
            size = (side, side)
            with torch.autocast(images.device.type, enabled=False):
                pixels = F.interpolate(pixels, size, mode=self.interpolation, align_corners=False)
        return torch.addcmul(self.shift, pixels, self.scale).contiguous(
            memory_format=torch.channels_last
        )
