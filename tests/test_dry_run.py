"""--dry-run knows any model's cost without computing or allocating it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifar_dist.models.backbones import ModelConfig, build_model, num_parameters
from cifar_dist.recipe.dry_run import plan
from cifar_dist.recipe.estimate import readable
from cifar_dist.recipe.load import validate
from cifar_dist.utils.errors import UserError


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


def flops(said: str) -> float:
    """Of the whole training."""
    number, unit = said.partition(", ")[2].split(" in the whole")[0].split()[-2:]
    return float(number) * 1000 ** " kMGTP".index(unit)


def test_an_epoch_costs_what_its_size_costs() -> None:
    def said(**model: object) -> str:
        raw = {"name": "a", "model": {"backbone": "test_resnet", "image_size": 64, **model}}
        return plan(validate(raw | {"run": {"epochs": 4, "batch_size": 250}}, where="here"))

    large, small = flops(said()), flops(said(image_size=32))
    grown = flops(said(growing={"start": 32, "epochs": 2}))  # 32, 64, 64, 64: 48 is rounded up
    assert grown == pytest.approx((3 * large + small) / 4, rel=0.01)
    both = flops(said(second_size=32))
    assert both == pytest.approx((large + small) / 2, rel=0.01)


def test_a_live_teacher_is_counted(tmp_path: Path) -> None:
    run = {"name": "a", "losses": {"distill": {}, "cross_entropy": {}}}
    run |= {"model": {"backbone": "test_resnet"}}
    teacher = {"run": str(tmp_path / "t.safetensors"), "model": {"backbone": "test_resnet"}}
    alone = flops(plan(validate({"name": "a", "model": run["model"]}, where="here")))
    taught = plan(validate(run | {"teacher": teacher}, where="here"))
    assert flops(taught) == pytest.approx(4 / 3 * alone, rel=0.01)
    assert "of the teacher's" in taught
    away = plan(validate(run | {"teacher": {"run": str(tmp_path / "no")}}, where="here"))
    assert flops(away) == pytest.approx(alone, rel=0.01)
    assert f"without what {tmp_path / 'no'} costs" in away


@pytest.mark.parametrize("keys", [{"run": {"batch_size": 60000}}, {"data": {"holdout": 49900}}])
def test_what_cannot_make_a_step_is_refused(keys: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"rows to train on.*lower"):
        plan(validate({"name": "a", "model": {"backbone": "test_resnet"}, **keys}, where="here"))


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"data": {"holdout": 7}}, "multiple of 100"),
        ({"data": {"holdout": 60000}}, "below 50000"),
        ({"optim": {"layer_decay": 0.7}, "model": {"backbone": "resnet8x4"}}, "layer_decay"),
        ({"augment": {"host": [{"Rotate": {"limt": 3}}]}}, "limit"),
        (
            {"model": {"backbone": "test_resnet", "freeze": [{"pattern": "backbon.*"}]}},
            "nothing is",
        ),
        ({"model": {"backbone": "test_resnet", "freeze": [{"pattern": "*"}]}}, "nothing learns"),
    ],
)
def test_what_training_refuses_at_its_start_is_refused(keys: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        plan(validate({"name": "a", "model": {"backbone": "test_resnet"}, **keys}, where="here"))


def test_what_is_frozen_needs_no_gradient_and_no_optimizer() -> None:
    def gibibytes(**model: object) -> float:
        raw = {"name": "a", "model": {"backbone": "resnet50", **model}}
        said = plan(validate(raw | {"run": {"batch_size": 2}}, where="here"))
        return float(said.partition("at least ")[2].split()[0])

    learning = num_parameters(build_model(ModelConfig(backbone="resnet50"), 100))
    saved = gibibytes() - gibibytes(freeze=[{"pattern": "backbone.*"}])
    assert saved >= 0.9 * 3 * 4 * learning / 2**30  # AdamW's two and the gradient


def test_the_data_take_what_the_canvas_takes() -> None:
    def gibibytes(**augment: object) -> float:
        raw = {"name": "a", "model": {"backbone": "test_resnet"}, "augment": augment}
        said = plan(validate(raw, where="here"))
        return float(said.partition("a shard), and ")[2].split()[0])

    assert gibibytes() == pytest.approx(0.14, abs=0.006)
    assert gibibytes(crop_padding=4, flip=True) == pytest.approx(0.14 + 0.447, abs=0.006)


def test_two_passes_cost_twice_and_keep_the_weights() -> None:
    def said(**optim: object) -> str:
        raw = {"name": "a", "model": {"backbone": "test_resnet"}, "optim": optim}
        return plan(validate(raw, where="here"))

    plain, sam = said(sam=None), said(sam={})
    once, twice = (float(text.partition("forward, ")[2].split()[0]) for text in (plain, sam))
    assert twice == pytest.approx(2 * once, rel=0.01)
