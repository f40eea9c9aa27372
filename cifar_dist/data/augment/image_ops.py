"""Image operations of the augmentation: pure functions of a batch and one parameter per image.

Images are uint8 [B, 3, S, S] on any device, and no op synchronizes with it. Ops process the whole
batch: an image that should not change gets the parameter that leaves every bit unchanged. Matrix
products and convolutions are avoided, since autocast would round them: the result depends neither on
the training precision nor on the other images of the batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

MEAN_COLOR = (129, 124, 112)  # CIFAR-100's mean, rounded
BLEND_OPS = ("none", "brightness", "contrast", "color", "sharpness")  # `kind` of `enhance`
LUT_OPS = ("none", "posterize", "solarize", "autocontrast", "equalize")  # `kind` of `apply_lut`

Interpolation = Literal["nearest", "bilinear"]


def per_sample(parameter: Tensor) -> Tensor:
    """Return a [B] parameter as [B, 1, 1, 1] to broadcast over images."""
    return parameter[:, None, None, None]


# ----------------------------------------------------------------------------- geometry


def warp(images: Tensor, matrix: Tensor, interpolation: Interpolation) -> Tensor:
    """Return images whose pixel (x, y) is the input at (a x + b y + c, d x + e y + f).

    `matrix` holds (a ... f), f32 [B, 6]. Coordinates are in pixels from the center, y points down,
    and the outside is black.
    """
    size = images.shape[-1]
    positions = torch.arange(size, device=images.device) - (size - 1) / 2
    a, b, c, d, e, f = matrix[:, :, None, None].unbind(1)
    # Separate products and sums: the rounding of a fused operation could depend on the batch.
    x = a * positions + b * positions[:, None] + c  # [B, S, S]
    y = d * positions + e * positions[:, None] + f
    grid = torch.stack([x, y], dim=-1) / (size / 2)  # exact for 32 px: 16 is a power of two
    warped = F.grid_sample(
        images.float(), grid, mode=interpolation, padding_mode="zeros", align_corners=False
    )
    return warped.round().to(torch.uint8)


# ----------------------------------------------------------------------------- colors


def grayscale(images: Tensor) -> Tensor:
    """Return the luma of each pixel (ITU-R 601-2 in Pillow's integers), integral f32 [B, 1, S, S]."""
    red, green, blue = images.float().split(1, dim=1)
    # All sums are below 2^24, hence exact.
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536).floor()


def mean_grayscale(gray: Tensor) -> Tensor:
    """Return the rounded mean of a grayscale image, f32 [B, 1, 1, 1]."""
    return (gray.mean((2, 3), keepdim=True) + 0.5).floor()


def smooth(images: Tensor) -> Tensor:
    """Filter with Pillow's 3 x 3 smoothing kernel (center 5/13, neighbors 1/13), rounded.

    The outermost pixels stay unchanged.
    """
    pixels = images.float()
    lines = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    sums = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]  # of all nine, exact integers
    inner = pixels[:, :, 1:-1, 1:-1]
    inner.copy_(((sums + 4 * inner + 6) / 13).floor())
    return pixels


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return other + factor * (images - other), clamped to 0 ... 255 and truncated to integers.

    `factor` is f32 [B]; 1 leaves an image unchanged. With other = black, the mean gray, the grayscale
    or the smoothed image this equals the four enhancers of Pillow's ImageEnhance.
    """
    # In place, because allocating memory costs a CPU more than the arithmetic.
    blended = images.float().sub_(other).mul_(per_sample(factor)).add_(other)
    return blended.clamp_(0, 255).to(torch.uint8)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.float().mul_(per_sample(factor)).clamp_(0, 255).to(torch.uint8)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    return blend(images, mean_grayscale(grayscale(images)), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return blend(images, grayscale(images), factor)


def enhance(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """Apply to each image the blend of its `kind`, an index into BLEND_OPS, in a single blend."""
    kind, gray = per_sample(kind), grayscale(images)
    other = torch.where(kind == BLEND_OPS.index("color"), gray, smooth(images))
    other = torch.where(kind == BLEND_OPS.index("contrast"), mean_grayscale(gray), other)
    return blend(images, other * (kind != BLEND_OPS.index("brightness")), factor)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of each image in HSV by `shift`, f32 [B], in turns of the color wheel.

    The conversion back to RGB is level(n) = V - V S max(0, min(k, 4 - k, 1)), k = (n + 6 H) mod 6, with
    n = 5, 3, 1 for red, green and blue (Wikipedia, "HSL and HSV"), where V S = max - min.
    """
    pixels = images.float()
    red, green, blue = pixels.split(1, dim=1)
    high, low = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    chroma = high - low
    divisor = chroma.clamp(min=1)  # a gray pixel has any hue
    hue = torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(high == red, (green - blue) / divisor, hue)  # in sixths of a turn
    n = torch.arange(5, 0, -2, device=images.device)[:, None, None]
    k = n + hue + 6 * per_sample(shift)
    k = k - 6 * (k / 6).floor()  # [B, 3, S, S]
    return (high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)).round().to(torch.uint8)


def apply_lut(images: Tensor, kind: Tensor, level: Tensor) -> Tensor:
    """Map the levels of each channel through a lookup table of `kind`, an index into LUT_OPS.

    posterize keeps the highest `level` (f32 [B]) of 8 bits; solarize inverts levels from `level` on;
    autocontrast stretches the range to 0 ... 255; equalize flattens the histogram, as in Pillow.
    """
    kind, level = kind[:, None, None], level[:, None, None]
    flat = images.flatten(2)
    index = flat.long()  # [B, 3, S * S]
    levels = torch.arange(256, device=images.device)
    low, high = flat.amin(2, keepdim=True).long(), flat.amax(2, keepdim=True).long()
    stretched = ((levels - low) * 255 // (high - low).clamp(min=1)).clamp(0, 255)
    stretched = torch.where(high > low, stretched, levels)

    counts = index.new_zeros(*index.shape[:2], 256)
    counts.scatter_add_(2, index, index.new_ones(()).expand_as(index))
    step = (flat.shape[2] - counts.gather(2, high)) // 255
    below = counts.cumsum(2) - counts
    equalized = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    equalized = torch.where(step > 0, equalized, levels)

    unit = 2 ** (8 - level)
    table = torch.where(kind == LUT_OPS.index("posterize"), (levels / unit).floor() * unit, levels)
    solarized = torch.where(levels < level, levels, 255 - levels)
    table = torch.where(kind == LUT_OPS.index("solarize"), solarized, table)
    table = torch.where(kind == LUT_OPS.index("autocontrast"), stretched, table)
    table = torch.where(kind == LUT_OPS.index("equalize"), equalized, table)
    return table.to(torch.uint8).gather(2, index).view_as(images)


# ----------------------------------------------------------------------------- holes and mixing


def box_mask(box: Tensor, size: int) -> Tensor:
    """Return the pixels with top <= y < bottom and left <= x < right, bool [B, 1, S, S].

    `box` holds (top, bottom, left, right), int64 [B, 4]; `size` is S.
    """
    positions = torch.arange(size, device=box.device)
    top, bottom, left, right = box[:, :, None].unbind(1)  # [B, 1] each
    lines = (positions >= top) & (positions < bottom)
    columns = (positions >= left) & (positions < right)
    return (lines[:, :, None] & columns[:, None, :])[:, None]


def fill_mean(images: Tensor, mask: Tensor) -> Tensor:
    """Fill the pixels of `mask` (bool [B, 1, S, S]) with the mean color."""
    hole = mask.to(torch.uint8)
    # Plain numbers: copying a tensor of the color to the device would synchronize with it.
    color = torch.cat([hole * level for level in MEAN_COLOR], dim=1)
    return images * (1 - hole) + color


def cutout(images: Tensor, hole_y: Tensor, hole_x: Tensor, size: int) -> Tensor:
    """Fill a square of `size` pixels around each center with the mean color."""
    top, left = hole_y - size // 2, hole_x - size // 2
    box = torch.stack([top, top + size, left, left + size], dim=1)
    return fill_mean(images, box_mask(box, images.shape[-1]))


def noise(seed: Tensor, size: int) -> Tensor:
    """Return uniform pseudo-random bytes, uint8 [B, 3, size, size], for each `seed` (int64 below 2^31).

    Two rounds of multiply and shift; no product reaches 2^63.
    """
    state = seed[:, None] + torch.arange(3 * size * size, device=seed.device)
    state *= 1_640_531_527  # odd, near 2^32 - 2^32 / golden ratio (Knuth, TAOCP 3, 6.4)
    state ^= state >> 29
    state &= 0x7FFFFFFF
    state *= 1_566_083_941
    state >>= 30
    return state.to(torch.uint8).view(-1, 3, size, size)  # the lowest 8 bits


def erase(images: Tensor, box: Tensor, filling: Tensor) -> Tensor:
    """Replace the pixels in `box` (int64 [B, 4] as in `box_mask`) by `filling`, uint8 [B, 3, S, S]."""
    return torch.where(box_mask(box, images.shape[-1]), filling, images)


def resize_into(images: Tensor, box: Tensor, resized: Tensor) -> Tensor:
    """Return images of which those that are `resized` (bool [B]) are shrunk into their boxes.

    `box` is int64 [B, 4] as in `box_mask`; pixels outside of it are undefined. The nearest pixel is used,
    as by torch's interpolate.
    """
    size = images.shape[-1]
    positions = torch.arange(size, device=images.device)

    def source(start: Tensor, end: Tensor) -> Tensor:
        """Return the input position of each output position, int64 [B, S]."""
        position = (positions - start[:, None]) * size // (end - start)[:, None].clamp(min=1)
        return torch.where(resized[:, None], position.clamp(0, size - 1), positions)

    top, bottom, left, right = box.unbind(1)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    lines, columns = source(top, bottom)[:, :, None], source(left, right)[:, None, :]
    return images.permute(0, 2, 3, 1)[sample, lines, columns].permute(0, 3, 1, 2)


def mix(images: Tensor, others: Tensor, lam: Tensor, box: Tensor, pasted: Tensor) -> Tensor:
    """Blend each image with its partner or, if `pasted`, paste the partner's box into it."""
    blended = (per_sample(lam) * images + (1 - per_sample(lam)) * others).round().to(torch.uint8)
    return torch.where(per_sample(pasted), erase(images, box, others), blended)
