"""All random, averaging and perturbing features in one run: same bits for any world size and any kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compare import assert_same_bits, lines
from launcher import Launch, train
from restarts import kill_and_resume

from recipes import RecipeMaker, TeacherMaker, with_teachers

PIPELINE = [
    {"OneOf": {"p": 0.8, "transforms": [{"HorizontalFlip": {"p": 1.0}}, {"Blur": {"p": 1.0}}]}}
]


def everything(
    recipe: RecipeMaker, precision: str, *, placement: str = "replicated", **run: Any
) -> Path:
    sections: dict[str, Any] = with_teachers("big", placement=placement)
    sections["losses"] |= {"bce": {"weight": 0.1, "label_smoothing": 0.1}}
    return recipe(
        run={"epochs": 3, "precision": precision, "batch_size": 16, "micro_batches": 4} | run,
        model={"drop_rate": 0.1, "drop_path_rate": 0.2, "mixed_resolution": 48},
        augment={
            "albumentations": PIPELINE,
            "workers": 2,
            "affine": {"degrees": 10, "translate": 0.1},
            "one_of": {"color_jitter": {"brightness": 0.3}, "erasing": {}},
            "trivial_augment": {},
            **({"views": 2} if placement == "cached" else {}),
        },
        optim={"sam": {"rho": 0.05}, "lr": 0.001},
        **sections,
    )


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.fault)])
def test_same_bits_with_processes_workers_and_kills(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker, precision: str
) -> None:
    """albumentations workers, device augmentation, mixing, SAM, two sizes, dropout, EMA, a teacher."""
    teacher("big", image_size=48)
    path = everything(recipe, precision)
    train(path, "name=one", "augment.workers=0", cwd=tmp_path)
    train(path, "name=four", cwd=tmp_path, world_size=4)
    assert_same_bits(tmp_path / "runs/one", tmp_path / "runs/four")
    assert lines(tmp_path / "runs/one")[-1]["step"] == 12
    kill_and_resume(path, tmp_path, [3, 7], last_step=12)
    assert_same_bits(tmp_path / "runs/one", tmp_path / "runs/killed")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("precision", "placement"),
    [("fp32", "replicated"), ("fp32", "sharded"), ("fp32", "cached"), ("bf16", "replicated")],
)
def test_same_bits_on_any_path_of_world_sizes(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker, precision: str, placement: str
) -> None:
    """Killed on four, two, and eight processes, finished on one."""
    teacher("big", image_size=48)
    run = {"epochs": 100, "eval_every_epochs": 50, "batch_size": 32, "micro_batches": 8}
    path = everything(recipe, precision, placement=placement, **run)
    if placement == "cached":
        assert Launch("cache_logits", [path], cwd=tmp_path).wait() == [0]
    train(path, "name=straight", cwd=tmp_path)
    kill_and_resume(path, tmp_path, [1, 40, 80], last_step=200, world_sizes=[4, 2, 8, 1])
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/killed")
