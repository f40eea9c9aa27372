"""All random, averaging and perturbing features in one run: same bits for any world size and any kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compare import assert_same_bits, lines
from launcher import train
from restarts import kill_and_resume

from recipes import RecipeMaker, TeacherMaker, with_teachers

PIPELINE = [
    {"OneOf": {"p": 0.8, "transforms": [{"HorizontalFlip": {"p": 1.0}}, {"Blur": {"p": 1.0}}]}}
]


def everything(recipe: RecipeMaker, precision: str) -> Path:
    sections: dict[str, Any] = with_teachers("big")
    sections["losses"] |= {"bce": {"weight": 0.1, "label_smoothing": 0.1}}
    return recipe(
        run={"epochs": 3, "precision": precision},
        model={"drop_rate": 0.1, "drop_path_rate": 0.2, "mixed_resolution": 48},
        augment={
            "albumentations": PIPELINE,
            "workers": 2,
            "affine": {"degrees": 10, "translate": 0.1},
            "one_of": {"color_jitter": {"brightness": 0.3}, "erasing": {}},
            "trivial_augment": {},
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
    train(path, "name=two", cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/one", tmp_path / "runs/two")
    assert lines(tmp_path / "runs/one")[-1]["step"] == 18
    kill_and_resume(path, tmp_path, [4, 9], last_step=18)
    assert_same_bits(tmp_path / "runs/one", tmp_path / "runs/killed")
