"""Progressive resizing and mixed resolution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compare import assert_same_bits, tensors
from launcher import Launch, train
from restarts import EVERY_STEP, wait_for_step

from cifar_dist.models.classifier import ModelConfig, ProgressiveResize, build_model
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker

IMAGES = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)


def test_sizes_grow_in_steps_to_the_last_one() -> None:
    resize = ProgressiveResize(start=96, epochs=10, multiple=32)
    sizes = [resize.size_in(epoch, 224) for epoch in range(12)]
    assert sizes == [96, 96, 128, 128, 160, 160, 160, 192, 192, 224, 224, 224]
    assert ModelConfig(image_size=224).train_size(0) == 224
    odd = ProgressiveResize(start=20, epochs=2, multiple=4)
    assert [odd.size_in(epoch, 30) for epoch in range(3)] == [20, 24, 30]


def test_evaluation_uses_the_final_size() -> None:
    model = build_model(ModelConfig(backbone="test_resnet", image_size=64), 10)
    seen: list[int] = []
    model.backbone.register_forward_pre_hook(lambda _, pixels: seen.append(pixels[0].shape[-1]))
    model.train_size = 48
    model(IMAGES)
    model.eval()
    model(IMAGES)
    assert seen == [48, 64]


def test_half_of_the_images_have_the_second_size_in_order() -> None:
    """3 of 7 images at 48 px, drawn in each step; evaluation uses the first size."""
    config = ModelConfig(backbone="test_resnet", image_size=32, mixed_resolution=48)
    model = build_model(config, 10)
    seen: list[tuple[int, ...]] = []
    model.backbone.register_forward_pre_hook(lambda _, pixels: seen.append(pixels[0].shape))
    for norm in model.modules():  # features of an image then do not depend on the others
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval()
    chosen = set()
    with torch.no_grad():
        at_first = model.backbone(model.preprocess(IMAGES))
        at_second = model.backbone(model.preprocess(IMAGES, 48))
        seen.clear()
        for seed in range(4):
            torch.manual_seed(seed)
            actual = model(IMAGES).embedding
            is_second = (actual - at_second).abs().amax(1) < 1e-5
            is_first = (actual - at_first).abs().amax(1) < 1e-5
            assert is_second.sum() == 3
            assert torch.equal(is_first, ~is_second)
            chosen.add(tuple(is_second.tolist()))
    assert seen[:2] == [(3, 3, 48, 48), (4, 3, 32, 32)]
    assert len(chosen) > 1
    model.eval()
    seen.clear()
    model(IMAGES)
    assert seen == [(7, 3, 32, 32)]


@pytest.mark.parametrize(
    "model",
    [
        pytest.param({"mixed_resolution": 48}, id="two sizes", marks=pytest.mark.fault),
        pytest.param(
            {"image_size": 64, "progressive_resize": {"start": 32, "epochs": 3, "multiple": 16}},
            id="growing",
        ),
    ],
)
def test_same_bits_with_processes_and_a_kill(
    tmp_path: Path, recipe: RecipeMaker, model: dict[str, object]
) -> None:
    path = recipe(model=model)
    train(path, "name=one", cwd=tmp_path)
    train(path, "name=two", cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/one", tmp_path / "runs/two")
    arguments = [path, "name=killed", f"run.save_every_minutes={EVERY_STEP}"]
    alone = Launch("train", arguments, cwd=tmp_path)
    wait_for_step(alone, tmp_path / "runs/killed", 8)
    alone.kill()
    train(*arguments, cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/one", tmp_path / "runs/killed")
    size = model.get("image_size", 32)
    train(recipe("plain", model={"image_size": size}), cwd=tmp_path)
    plain, other = tensors(tmp_path / "runs/plain"), tensors(tmp_path / "runs/one")
    assert not torch.equal(plain["logits"], other["logits"])


def test_unsupported_sizes_are_refused_at_the_start() -> None:
    with pytest.raises(UserError, match="48 px"):
        build_model(
            ModelConfig(backbone="vit_tiny_patch16_224", image_size=64, mixed_resolution=48), 10
        )
    resize = ProgressiveResize(start=32, epochs=4, multiple=8)  # 32, 40, 48, 56, then 64
    with pytest.raises(UserError, match="cannot take 40 px"):
        build_model(ModelConfig(backbone="dla34", image_size=64, progressive_resize=resize), 10)
    with pytest.raises(ValueError, match="remove one"):
        ModelConfig(
            image_size=64,
            mixed_resolution=48,
            progressive_resize=ProgressiveResize(start=32, epochs=1),
        )
    with pytest.raises(ValueError, match="lower it"):
        ModelConfig(image_size=64, progressive_resize=ProgressiveResize(start=96, epochs=1))
