"""The recipes of the project, made small."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml"))


SMALL = {  # by how a backbone's name begins
    "resnet9": "resnet9",
    "resnet8x4": "resnet8x4",
    "resnet32x4": "resnet8x1",
    "resnet": "test_resnet",
    "wrn": "wrn_10_1",
    "vit": "test_vit",
    "deit": "test_vit",
    "eva": "test_vit",
    "convnext": "test_convnext",
    "efficientnet": "test_efficientnet",
}
