"""Floor 1. What augmentation does to pictures: pure functions of a batch and one parameter a picture.

Pictures are uint8 [B, 3, 32, 32] in and out, on whatever device they are; nothing waits for it. An op
is dense: a picture that is to stay as it is gets the parameter which leaves every bit of it alone. No
product of matrices and no convolution, as autocast would round these: what a picture looks like does
not depend on the precision of the training around it, nor on the batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 32  # CIFAR's pictures are 32 x 32
PIXELS = SIDE * SIDE
MEAN_COLOR = (129, 124, 112)  # CIFAR-100's mean, rounded: a hole carries no contrast of its own
BLEND_OPS = ("none", "brightness", "contrast", "color", "sharpness")  # `kind` of `enhance`
LUT_OPS = ("none", "posterize", "solarize", "autocontrast", "equalize")  # `kind` of `look_up`

Interpolation = Literal["nearest", "bilinear"]


def per_sample(parameter: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1], to be spread over pictures."""
    return parameter[:, None, None, None]


# ----------------------------------------------------------------------------- where pixels are


def warp(images: Tensor, matrix: Tensor, interpolation: Interpolation) -> Tensor:
    """Show at (x, y) what lies at (a x + b y + c, d x + e y + f) for `matrix` (a ... f), f32 [B, 6].

    In pixels from the picture's centre; y runs down; black outside.
    """
    along = torch.arange(SIDE, device=images.device) - (SIDE - 1) / 2
    a, b, c, d, e, f = matrix[:, :, None, None].unbind(1)
    # a product and a sum each: what a fused operation rounds could depend on the batch
    x = a * along + b * along[:, None] + c  # [B, 32, 32]
    y = d * along + e * along[:, None] + f
    grid = torch.stack([x, y], dim=-1) / (
        SIDE / 2
    )  # exact: the halves of a side are a power of two
    shown = F.grid_sample(
        images.float(), grid, mode=interpolation, padding_mode="zeros", align_corners=False
    )
    return shown.round().to(torch.uint8)


# ----------------------------------------------------------------------------- colours


def grayscale(images: Tensor) -> Tensor:
    """How light each pixel is, whole levels in f32 [B, 1, 32, 32]: ITU-R 601-2 in Pillow's integers."""
    red, green, blue = images.float().split(1, dim=1)
    # all sums are below 2^24, hence exact
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536).floor()


def mean_grayscale(images: Tensor) -> Tensor:
    """How light a picture is, a whole level in f32 [B, 1, 1, 1]."""
    return (grayscale(images).mean((2, 3), keepdim=True) + 0.5).floor()


def smooth(images: Tensor) -> Tensor:
    """Each pixel with its 8 neighbours, 5 parts to 8 of 13, rounded; the outermost pixels as they are."""
    pixels = images.float()
    lines = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    around = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]  # all nine, whole numbers
    inner = pixels[:, :, 1:-1, 1:-1]
    inner.copy_(((around + 4 * inner + 6) / 13).floor())
    return pixels


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """other + factor * (images - other), cut off at 0 and 255; `factor` f32 [B], 1 changes nothing.

    Fractions of a level are dropped, as Pillow's ImageEnhance does, whose four enhancements this is
    with other = black, the mean grey, the grey picture, the smooth picture.
    """
    # in place, as fresh memory costs a CPU more than the arithmetic
    moved = images.float().sub_(other).mul_(per_sample(factor)).add_(other)
    return moved.clamp_(0, 255).to(torch.uint8)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.float().mul_(per_sample(factor)).clamp_(0, 255).to(torch.uint8)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    return blend(images, mean_grayscale(images), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return blend(images, grayscale(images), factor)


def enhance(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """Blend each picture with what its `kind` names, a number of BLENDS: one blend for all kinds."""
    kind, light = per_sample(kind), grayscale(images)
    mean = (light.mean((2, 3), keepdim=True) + 0.5).floor()
    other = torch.where(kind == BLEND_OPS.index("color"), light, smooth(images))
    other = torch.where(kind == BLEND_OPS.index("contrast"), mean, other)
    return blend(images, other * (kind != BLEND_OPS.index("brightness")), factor)


def shift_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn each picture's hues on the colour wheel of HSV; `turn` f32 [B], 1 is a whole turn.

    The way back to RGB is level(n) = V - V S max(0, min(k, 4 - k, 1)), k = (n + 6 H) mod 6, with
    n = 5, 3, 1 for red, green and blue (Wikipedia, "HSL and HSV"), where V S = max - min.
    """
    pixels = images.float()
    red, green, blue = pixels.split(1, dim=1)
    high, low = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    chroma = high - low
    divisor = chroma.clamp(min=1)  # a grey pixel stays as it is, whatever its hue
    hue = torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(high == red, (green - blue) / divisor, hue)  # in sixths of a turn
    n = torch.arange(5, 0, -2, device=images.device)[:, None, None]
    k = n + hue + 6 * per_sample(turn)
    k = k - 6 * (k / 6).floor()  # [B, 3, 32, 32]
    return (high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)).round().to(torch.uint8)


def apply_lut(images: Tensor, kind: Tensor, level: Tensor) -> Tensor:
    """Replace levels by those of a table a picture and channel, by `kind`, a number of LOOK_UPS.

    posterize keeps the `level` (f32 [B]) highest of 8 bits; solarize inverts from `level` on;
    autocontrast stretches what is there to 0 ... 255; equalize spreads it evenly, as Pillow does.
    """
    kind, level = kind[:, None, None], level[:, None, None]
    flat = images.flatten(2)
    places = flat.long()  # [B, 3, 1024]
    levels = torch.arange(256, device=images.device)
    low, high = flat.amin(2, keepdim=True).long(), flat.amax(2, keepdim=True).long()
    stretched = ((levels - low) * 255 // (high - low).clamp(min=1)).clamp(0, 255)
    stretched = torch.where(high > low, stretched, levels)

    counts = places.new_zeros(*places.shape[:2], 256)
    counts.scatter_add_(2, places, places.new_ones(()).expand_as(places))
    step = (PIXELS - counts.gather(2, high)) // 255
    below = counts.cumsum(2) - counts
    spread = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    spread = torch.where(step > 0, spread, levels)

    unit = 2 ** (8 - level)
    table = torch.where(kind == LUT_OPS.index("posterize"), (levels / unit).floor() * unit, levels)
    solarized = torch.where(levels < level, levels, 255 - levels)
    table = torch.where(kind == LUT_OPS.index("solarize"), solarized, table)
    table = torch.where(kind == LUT_OPS.index("autocontrast"), stretched, table)
    table = torch.where(kind == LUT_OPS.index("equalize"), spread, table)
    return table.to(torch.uint8).gather(2, places).view_as(images)


# ----------------------------------------------------------------------------- holes and partners


def box_mask(box: Tensor) -> Tensor:
    """Which pixels lie in top <= y < bottom, left <= x < right; bool [B, 1, 32, 32] of int64 [B, 4]."""
    along = torch.arange(SIDE, device=box.device)
    top, bottom, left, right = box[:, :, None].unbind(1)  # [B, 1] each
    lines, columns = (along >= top) & (along < bottom), (along >= left) & (along < right)
    return (lines[:, :, None] & columns[:, None, :])[:, None]


def fill_mean(images: Tensor, inside: Tensor) -> Tensor:
    """Give the pixels `inside` (bool [B, 1, 32, 32]) the mean colour."""
    hole = inside.to(torch.uint8)
    # plain numbers rather than a tensor of the colour, whose copy to the device would wait for it
    colour = torch.cat([hole * level for level in MEAN_COLOR], dim=1)
    return images * (1 - hole) + colour


def cutout(images: Tensor, hole_y: Tensor, hole_x: Tensor, size: int) -> Tensor:
    """Cover a square of `size` pixels around each centre with the mean colour."""
    top, left = hole_y - size // 2, hole_x - size // 2
    return fill_mean(images, box_mask(torch.stack([top, top + size, left, left + size], dim=1)))


def noise(seed: Tensor) -> Tensor:
    """Bytes like thrown dice, uint8 [B, 3, 32, 32], a pure function of each `seed`, int64 below 2^31.

    Two rounds of multiply and shift; no product reaches 2^63.
    """
    state = seed[:, None] + torch.arange(3 * PIXELS, device=seed.device)
    state *= 1_640_531_527  # odd, near 2^32 less 2^32 by the golden ratio (Knuth, TAOCP 3, 6.4)
    state ^= state >> 29
    state &= 0x7FFFFFFF
    state *= 1_566_083_941
    state >>= 30
    return state.to(torch.uint8).view(-1, 3, SIDE, SIDE)  # the lowest 8 of the bits that are left


def erase(images: Tensor, box: Tensor, filling: Tensor) -> Tensor:
    """Put `filling`, uint8 [B, 3, 32, 32], into each `box`, int64 [B, 4] as in `in_box`."""
    return torch.where(box_mask(box), filling, images)


def mix(images: Tensor, others: Tensor, lam: Tensor, box: Tensor, pasted: Tensor) -> Tensor:
    """Blend each picture with its partner, or paste the partner's box into it; uint8 [B, 3, 32, 32]."""
    blended = (per_sample(lam) * images + (1 - per_sample(lam)) * others).round().to(torch.uint8)
    return torch.where(per_sample(pasted), erase(images, box, others), blended)
