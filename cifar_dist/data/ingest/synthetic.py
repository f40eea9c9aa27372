"""Generate synthetic images of 10 shapes x 10 colors, for tests and first runs.

The data have the layout of CIFAR-100: 100 fine classes in 20 coarse ones. Classes are invariant to a
horizontal flip and to a shift by 4 pixels.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np

from cifar_dist.data.ingest.pickles import BATCH_LABELS, RawMeta, RawSplit

COLORS = {  # RGB in 0..1, jittered per image
    "red": (0.86, 0.12, 0.14),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.97, 0.88, 0.20),
    "brown": (0.48, 0.28, 0.12),
    "pink": (0.97, 0.55, 0.72),
    "green": (0.16, 0.62, 0.22),
    "cyan": (0.20, 0.80, 0.84),
    "blue": (0.14, 0.26, 0.84),
    "purple": (0.52, 0.18, 0.68),
    "white": (0.95, 0.95, 0.95),
}


def _polygon(u: np.ndarray, v: np.ndarray, corners: int) -> np.ndarray:
    """Return the distance from the edge of a regular polygon with a corner on top, negative inside."""
    sector = 2 * np.pi / corners
    angle = np.mod(np.arctan2(u, -v) + sector / 2, sector) - sector / 2
    return np.hypot(u, v) * np.cos(np.abs(angle) - sector / 2) - np.cos(sector / 2) * 0.95


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    angle = np.arctan2(u, -v)
    return np.hypot(u, v) - 0.62 - 0.34 * np.cos(5 * angle)


# Signed distance functions, negative inside; u points right, v down, and shapes have a radius of about 1.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: np.hypot(u, v) - 0.85,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.7) - 0.22,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.76,
    "frame": lambda u, v: np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.64) - 0.2,
    "triangle": lambda u, v: _polygon(u, v, 3),
    "plus": lambda u, v: np.maximum(
        np.minimum(np.abs(u), np.abs(v)) - 0.28, np.maximum(np.abs(u), np.abs(v)) - 0.92
    ),
    "star": _star,
    "moon": lambda u, v: np.maximum(np.hypot(u, v) - 0.9, 0.72 - np.hypot(u, v + 0.5)),
    "hourglass": lambda u, v: np.maximum(np.abs(u) - 0.85 * np.abs(v) - 0.1, np.abs(v) - 0.85),
    "bars": lambda u, v: np.maximum(
        0.17 - np.abs(np.abs(v) - 0.34), np.maximum(np.abs(u), np.abs(v)) - 0.85
    ),
}


def draw_synthetic(
    *, train_per_class: int = 60, test_per_class: int = 10, seed: int = 0
) -> tuple[RawSplit, RawSplit, RawMeta]:
    """Return train, test and the class names: fine = 10 x shape + color, coarse = fine // 5.

    The same arguments give the same images. The 7,000 rows of the default take 1 s on one core.
    """
    meta = RawMeta(
        fine_label_names=[f"{color}_{shape}" for shape in SHAPES for color in COLORS],
        coarse_label_names=[f"{tone}_{shape}" for shape in SHAPES for tone in ("warm", "cool")],
    )
    train = _draw_split(meta, train_per_class, np.random.Philox(key=[seed, 0]))
    test = _draw_split(meta, test_per_class, np.random.Philox(key=[seed, 1]))
    return train, test, meta


def pickle_members(train: RawSplit, test: RawSplit, meta: RawMeta) -> dict[str, bytes]:
    """Return the three files in the format of the original: protocol 2, keys and texts as bytes."""
    members = {
        name: {
            b"filenames": [filename.encode() for filename in raw.filenames],
            b"batch_label": BATCH_LABELS[name].encode(),
            b"fine_labels": raw.fine_labels.tolist(),
            b"coarse_labels": raw.coarse_labels.tolist(),
            b"data": raw.images,
        }
        for name, raw in (("train", train), ("test", test))
    }
    names = {
        b"fine_label_names": [name.encode() for name in meta.fine_label_names],
        b"coarse_label_names": [name.encode() for name in meta.coarse_label_names],
    }
    return {name: pickle.dumps(v, protocol=2) for name, v in {**members, "meta": names}.items()}


def _draw_split(meta: RawMeta, rows_per_class: int, bits: np.random.Philox) -> RawSplit:
    random = np.random.Generator(bits)
    rows = rows_per_class * len(meta.fine_label_names)
    fine = np.argsort(random.random(rows), kind="stable") % len(meta.fine_label_names)
    blocks = [_draw(fine[start : start + 500], random) for start in range(0, rows, 500)]
    return RawSplit(
        images=np.concatenate(blocks),
        fine_labels=fine,
        coarse_labels=fine // 5,
        filenames=[f"{meta.fine_label_names[c]}_s_{row:06d}.png" for row, c in enumerate(fine)],
    )


def _draw(fine: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draw one image for each label, uint8 [N, 3072]."""

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return low + (high - low) * random.random((len(fine), *shape))

    # (u, v) are the pixels in the coordinates of the shape.
    angle = uniform(-0.35, 0.35, 1, 1)  # radians
    radius = uniform(6.0, 10.5, 1, 1)  # pixels
    x = np.arange(32) - 15.5 - uniform(-4.5, 4.5, 1, 1)  # [N, 1, 32]
    y = np.arange(32)[:, None] - 15.5 - uniform(-4.5, 4.5, 1, 1)  # [N, 32, 1]
    u = (x * np.cos(angle) + y * np.sin(angle)) / radius  # [N, 32, 32]
    v = (y * np.cos(angle) - x * np.sin(angle)) / radius
    inside = np.empty_like(u)
    for index, distance in enumerate(SHAPES.values()):
        rows = fine // len(COLORS) == index
        inside[rows] = np.clip(0.5 - distance(u[rows], v[rows]) * radius[rows], 0, 1)

    # The background is a gradient between two grays with a slight tint.
    ends = uniform(0.15, 0.7, 2, 1, 1, 1) + uniform(-0.12, 0.12, 2, 3, 1, 1)
    slope = uniform(0, 2 * np.pi, 1, 1)
    ramp = np.clip(0.5 + (x * np.cos(slope) + y * np.sin(slope)) / 40, 0, 1)[:, None]
    images = ends[:, 0] * ramp + ends[:, 1] * (1 - ramp)  # [N, 3, 32, 32]

    color = np.array(list(COLORS.values()))[fine % len(COLORS)] + uniform(-0.09, 0.09, 3)
    light = uniform(0.72, 1.05, 1, 1, 1) * (1 + uniform(-0.15, 0.15, 1, 1, 1) * v[:, None])
    images += inside[:, None] * (color[:, :, None, None] * light - images)
    images += uniform(-0.09, 0.09, 3, 32, 32)
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8).reshape(len(fine), -1)
