"""`train --dry-run` estimates the cost of any model without computing or allocating it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from launcher import train

from cifar_dist.models.classifier import ModelConfig, build_model, num_parameters
from cifar_dist.recipe.dry_run import Plan, describe
from cifar_dist.recipe.load import validate
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.units import human_readable

SMALL = {"backbone": "test_resnet"}


def plan(**sections: Any) -> Plan:
    return describe(validate({"name": "a", "model": SMALL, **sections}, where="here"))


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
def test_parameters_match_the_real_model(backbone: str, image_size: int) -> None:
    model = {"backbone": backbone, "image_size": image_size, "head": "cosine"}
    real = build_model(ModelConfig(**model), 100)  # type: ignore[arg-type]
    assert plan(model=model, losses={"arcface": {}}).parameters == num_parameters(real)


def test_a_model_larger_than_the_machine_can_be_planned() -> None:
    model = {"backbone": "vit_giant_patch14_clip_224", "image_size": 224}
    assert plan(model=model).parameters == 1_011_344_740


@pytest.mark.parametrize(
    ("number", "text"),
    [(1, "1"), (999.6, "1 k"), (1234567, "1.23 M"), (2.2e15, "2.2 P"), (3e20, "300 E")],
)
def test_numbers_are_readable(number: float, text: str) -> None:
    assert human_readable(number) == text


def test_each_epoch_costs_according_to_its_image_size() -> None:
    def flops(**model: Any) -> int:
        model = SMALL | {"image_size": 64} | model
        return plan(model=model, run={"epochs": 4, "batch_size": 250}).training_flops

    large, small = flops(), flops(image_size=32)
    resized = flops(progressive_resize={"start": 32, "epochs": 2})  # 32, 64, 64, 64
    assert resized == pytest.approx((3 * large + small) / 4, rel=0.01)
    assert flops(mixed_resolution=32) == pytest.approx((large + small) / 2, rel=0.01)


def test_an_online_teacher_is_counted(tmp_path: Path) -> None:
    losses: dict[str, Any] = {"distill": {}, "cross_entropy": {}}
    teacher = {"run": str(tmp_path / "t.safetensors"), "model": SMALL}
    alone, distilled = plan(), plan(losses=losses, teacher=teacher)
    assert distilled.training_flops == pytest.approx(4 / 3 * alone.training_flops, rel=0.01)
    assert "for the teacher" in str(distilled)
    missing = str(tmp_path / "no")
    unknown = plan(losses=losses, teacher={"run": missing})
    assert unknown.training_flops == alone.training_flops
    assert unknown.unknown_teachers == [missing]
    assert f"without {missing}: not there yet" in str(unknown)


@pytest.mark.parametrize(
    "sections", [{"run": {"batch_size": 60000}}, {"data": {"val_size": 49900}}]
)
def test_a_recipe_without_a_whole_step_is_refused(sections: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"training rows.*lower"):
        plan(**sections)


def test_steps_are_those_of_the_training_rows(middle_data: Path) -> None:
    def steps(**data: Any) -> int:
        return plan(data=data, run={"batch_size": 10}).steps_per_epoch

    assert steps(long_tail={"imbalance": 100}) == 1084  # of 10,847 rows, assumed balanced
    assert steps(long_tail={"imbalance": 100}, val_size=400) == 1044
    assert steps(fraction=0.1, label_noise={"kind": "symmetric", "rate": 0.2}) == 500
    assert steps(path=str(middle_data), source=None, fraction=0.5, val_size=100) == 20


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"data": {"fraction": 0.01, "long_tail": {"imbalance": 6}}}, "imbalance=6: .*at most 5"),
        ({"data": {"val_size": 7}}, "multiple of 100"),
        ({"data": {"val_size": 60000}}, "below 50000"),
        ({"optim": {"layer_decay": 0.7}, "model": {"backbone": "resnet8x4"}}, "layer_decay"),
        ({"augment": {"albumentations": [{"Rotate": {"limt": 3}}]}}, "limit"),
        ({"model": SMALL | {"freeze": [{"pattern": "backbon.*"}]}}, "no parameter matches"),
        ({"model": SMALL | {"freeze": [{"pattern": "*"}]}}, "all parameters are frozen"),
    ],
)
def test_what_training_refuses_at_its_start_is_refused(
    sections: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        plan(**sections)


def test_frozen_parameters_need_no_gradient_and_no_optimizer_state() -> None:
    def memory(**model: Any) -> int:
        return plan(model={"backbone": "resnet50", **model}, run={"batch_size": 2}).memory_bytes

    parameters = num_parameters(build_model(ModelConfig(backbone="resnet50"), 100))
    saved = memory() - memory(freeze=[{"pattern": "backbone.*"}])
    assert saved >= 0.9 * 3 * 4 * parameters  # AdamW's two moments and the gradient


def test_padded_images_count_as_data() -> None:
    assert plan().data_bytes == 50_000 * 3092
    padded = plan(augment={"crop_padding": 4, "hflip": True}).data_bytes
    assert padded == 50_000 * (3092 + 2 * 3 * 40 * 40)


def test_sam_costs_two_passes() -> None:
    plain, sam = plan(), plan(optim={"sam": {}})
    assert sam.training_flops == 2 * plain.training_flops
    assert sam.memory_bytes > plain.memory_bytes


def test_json_has_every_field(tmp_path: Path) -> None:
    """The Makefile and slurm/train.sh read it."""
    path = tmp_path / "a.yaml"
    path.write_text("{name: a, model: {backbone: test_resnet}, run: {micro_batches: 3}}")
    printed = json.loads(train(path, "--dry-run", "--json", cwd=tmp_path).splitlines()[-1])
    assert printed.keys() == {field.name for field in dataclasses.fields(Plan)}
    assert printed["run_folder"] == "runs/a"
    assert printed["recipe"]["run"]["micro_batches"] == 3
