"""Each loss trains two steps with the same bits on one and two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compare import assert_same_bits, lines
from launcher import train

from cifar_dist.losses.registry import LOSSES
from recipes import RecipeMaker

COMBINED: dict[str, dict[str, Any]] = {  # with the loss that trains the classifier
    "triplet": {"cross_entropy": {}},
    "contrastive": {"cosface": {}},
    "supcon": {"bce": {}},
}
ALONE = ["bce", "arcface", "cosface", "sphereface", "l_softmax"]


@pytest.mark.parametrize("name", [*ALONE, *COMBINED])
def test_same_bits_on_one_and_two_processes(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path, name: str
) -> None:
    """Two micro-batches of 125 rows of 100 classes: most rows have a positive in their micro-batch."""
    losses = {name: {"weight": 0.5}, **COMBINED.get(name, {})}
    heads = {LOSSES[each].head for each in losses} - {None}
    path = recipe(
        run={"batch_size": 250, "epochs": 1, "log_every_steps": 1},
        data={"path": str(middle_data)},
        augment={}
        if all(LOSSES[each].supports_mixup for each in losses)
        else {"mixup": 0, "cutmix": 0},
        model={"head": heads.pop() if heads else "linear"},
        losses=losses,
    )
    for world_size in (1, 2):
        train(path, f"name=w{world_size}", cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w2")
    first, second = (line for line in lines(tmp_path / "runs/w1") if line["kind"] == "train")
    assert first[name] > 0
    assert first[name] != second[name]


def test_every_loss_without_a_teacher_is_covered() -> None:
    trained = {"cross_entropy", *ALONE, *COMBINED}  # cross_entropy in test_distributed.py
    assert trained == {name for name, kind in LOSSES.items() if not kind.needs_teacher}
