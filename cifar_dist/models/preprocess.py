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

WHITENED = 27  # the numbers of a 3x3 patch


class Preprocess(nn.Module):
    """uint8 [B,3,H,W] -> [B,3,S,S], channels_last: (x / 255 - mean) / std, then resized.

    Float32, or what autocast would have the backbone compute in: at 224 px half the memory to write
    and to read. Resizing is `F.interpolate` with align_corners=False, without anti-aliasing; bicubic may
    overshoot 0 to 255. It is linear and its weights add up to 1, so the order of the two is free.

    With `whiten` the result has WHITENED channels: 3x3 patches through filters that `patch_filters` finds
    in training pictures before anything is learnt, so that the first layer to learn meets features
    without correlation (Page 2019, "How to Train Your ResNet 8"; Jordan 2024, arXiv 2404.00498).
    """

    scale: Tensor
    shift: Tensor
    filters: Tensor

    def __init__(
        self,
        image_size: int,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        mean: RGB = (0.0, 0.0, 0.0),
        std: RGB = (1.0, 1.0, 1.0),
        whiten: bool = False,
    ) -> None:
        super().__init__()
        self.image_size, self.interpolation = image_size, interpolation
        center = torch.tensor(mean).view(1, 3, 1, 1)
        spread = torch.tensor(std).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * spread), persistent=False)
        self.register_buffer("shift", -center / spread, persistent=False)
        self.register_buffer("filters", torch.zeros(WHITENED, 3, 3, 3) if whiten else None)

    def forward(self, images: Tensor, image_size: int | None = None) -> Tensor:
        """`image_size`: another S than its own, for this call."""
        side, device = image_size or self.image_size, images.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else torch.float32
        # a whole row of numbers each: to spread three over planes costs a CPU five times as much
        scale, shift = (
            numbers.expand(1, *images.shape[1:]).flatten() for numbers in (self.scale, self.shift)
        )
        pixels = torch.addcmul(shift, images.flatten(1).float(), scale).to(dtype)
        pixels = pixels.view(images.shape).contiguous(memory_format=torch.channels_last)
        if pixels.shape[-2:] != (side, side):
            size = (side, side)
            with torch.autocast(device, enabled=False):  # on a CPU it would make float32 of it
                pixels = F.interpolate(pixels, size, mode=self.interpolation, align_corners=False)
        if self.filters is not None:
            pixels = F.conv2d(pixels, self.filters.to(dtype), padding=1)
        return pixels.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def whitening_filters(preprocess: Preprocess, images: Tensor, epsilon: float = 0.01) -> Tensor:
    """Filters, f32 [27, 3, 3, 3], whose answers to 3x3 patches of `images` have unit variance, uncorrelated.

    Eigenvectors of the patches' covariance over the root of their eigenvalues + `epsilon`, which keeps
    the weakest from being mostly noise.
    """
    plain = torch.addcmul(preprocess.shift, images.float(), preprocess.scale)
    patches = F.unfold(plain, 3).transpose(0, 1).flatten(1)  # [27, patches]
    values, vectors = torch.linalg.eigh(patches.double().cov())
    whitened = vectors.T / (values.clamp(min=0) + epsilon).sqrt()[:, None]
    return whitened.float().view(WHITENED, 3, 3, 3)
