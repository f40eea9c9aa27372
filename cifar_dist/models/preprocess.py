"""The model's first layer: uint8 images to normalized, resized floats."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RGB = tuple[float, float, float]

# Of CIFAR-100's 50,000 training images, on the scale 0 to 1.
CIFAR_MEAN: RGB = (0.5071, 0.4865, 0.4409)
CIFAR_STD: RGB = (0.2673, 0.2564, 0.2762)

WHITENED = 27  # values in a 3x3 RGB patch


class Preprocess(nn.Module):
    """Normalize, then resize: uint8 [B, 3, H, W] -> [B, 3, S, S] in channels_last.

    The result is (x / 255 - mean) / std in float32, or in autocast's dtype, which halves the memory
    traffic at 224 px. Resizing is `F.interpolate` with align_corners=False, without antialiasing;
    bicubic may overshoot the range. It is linear with weights that sum to 1, so the order of
    resizing and normalizing does not matter.

    With `whiten` the result has WHITENED channels: 3x3 patches through the filters of
    `whitening_filters`, computed on training images before training, so that the first trained layer
    sees uncorrelated features (Page 2019, "How to Train Your ResNet 8"; Jordan 2024, arXiv
    2404.00498).
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
        mean_, std_ = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
        self.register_buffer("scale", 1 / (255 * std_), persistent=False)
        self.register_buffer("shift", -mean_ / std_, persistent=False)
        self.register_buffer("filters", torch.zeros(WHITENED, 3, 3, 3) if whiten else None)

    def forward(self, images: Tensor, image_size: int | None = None) -> Tensor:
        """Preprocess uint8 images; `image_size` replaces self.image_size for this call."""
        return self.whiten(self.normalize_and_resize(images, image_size))

    def normalize_and_resize(self, images: Tensor, image_size: int | None = None) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, 3, S, S]"""
        side, device = image_size or self.image_size, images.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else torch.float32
        # Expanded to whole images: broadcasting 3 values over planes is 5 times as slow on a CPU.
        scale, shift = (
            values.expand(1, *images.shape[1:]).flatten() for values in (self.scale, self.shift)
        )
        pixels = torch.addcmul(shift, images.flatten(1).float(), scale).to(dtype)
        pixels = pixels.view(images.shape).contiguous(memory_format=torch.channels_last)
        if pixels.shape[-2:] != (side, side):
            size = (side, side)
            with torch.autocast(device, enabled=False):  # on a CPU it would cast to float32
                pixels = F.interpolate(pixels, size, mode=self.interpolation, align_corners=False)
        return pixels

    def whiten(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, WHITENED, S, S] with `whiten`, otherwise as given."""
        if self.filters is not None:
            pixels = F.conv2d(pixels, self.filters.to(pixels.dtype), padding=1)
        return pixels.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def whitening_filters(preprocess: Preprocess, images: Tensor, epsilon: float = 0.01) -> Tensor:
    """Return filters, f32 [27, 3, 3, 3], that decorrelate 3x3 patches of `images` to unit variance.

    They are the eigenvectors of the patch covariance divided by sqrt(eigenvalue + `epsilon`), which
    limits the noise of the weakest ones.
    """
    normalized = torch.addcmul(preprocess.shift, images.float(), preprocess.scale)
    patches = F.unfold(normalized, 3).transpose(0, 1).flatten(1)  # [27, patches]
    values, vectors = torch.linalg.eigh(patches.double().cov())
    whitened = vectors.T / (values.clamp(min=0) + epsilon).sqrt()[:, None]
    return whitened.float().view(WHITENED, 3, 3, 3)
