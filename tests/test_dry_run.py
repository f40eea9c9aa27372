"""--dry-run knows any model's cost without computing or allocating it."""

from __future__ import annotations

import pytest

from cifar_dist.dry_run import plan
from cifar_dist.engine.estimate import readable
from cifar_dist.nets.backbones import ModelConfig, build_model, num_parameters
from cifar_dist.recipe import validate


@pytest.mark.parametrize(
    ("backbone", "image_size"),
    [
        ("resnet18", 32),
        ("resnet8x4", 32),
        ("vit_tiny_patch16_224", 64),  # timm reads numbers while it builds one
        ("swin_tiny_patch4_window7_224", 64),
        ("convnext_atto", 64),
        ("eva02_tiny_patch14_224", 56),
        ("test_nfnet", 64),
    ],
)
def test_the_parameters_are_those_of_the_real_model(backbone: str, image_size: int) -> None:
    model = {"backbone": backbone, "image_size": image_size, "head": "cosine"}
    losses: dict[str, object] = {"arcface": {}}
    said = plan(validate({"name": "a", "model": model, "losses": losses}, where="here"))
    real = build_model(ModelConfig(backbone=backbone, image_size=image_size, head="cosine"), 100)
    assert f"parameters        {num_parameters(real):,}\n" in said


def test_a_model_larger_than_the_machine_is_planned() -> None:
    model = {"backbone": "vit_giant_patch14_clip_224", "image_size": 224}
    assert "parameters        1,011,344,740\n" in plan(
        validate({"name": "a", "model": model}, where="here")
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [(1, "1"), (999.6, "1 k"), (1234567, "1.23 M"), (2.2e15, "2.2 P"), (3e20, "300 E")],
)
def test_numbers_are_readable(number: float, text: str) -> None:
    assert readable(number) == text


def test_two_passes_cost_twice_and_keep_the_weights() -> None:
    def said(**optim: object) -> str:
        raw = {"name": "a", "model": {"backbone": "test_resnet"}, "optim": optim}
        return plan(validate(raw, where="here"))

    plain, sam = said(sam=None), said(sam={})
    once, twice = (float(text.partition("forward, ")[2].split()[0]) for text in (plain, sam))
    assert twice == pytest.approx(2 * once, rel=0.01)
