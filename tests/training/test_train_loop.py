"""Decisions of the training loop between two steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compare import lines
from launcher import train

from cifar_dist.train import should_evaluate, should_log, should_save
from recipes import RecipeMaker


@pytest.mark.parametrize(
    ("step", "pending", "at_end", "due"),
    [
        (50, 50, False, True),
        (100, 1, False, True),  # resumed at 99
        (60, 10, False, False),
        (60, 10, True, True),  # the end, at any step
        (0, 0, False, False),  # nothing to report yet
        (100, 0, True, False),  # reported before the restart
    ],
)
def test_should_log(step: int, pending: int, at_end: bool, due: bool) -> None:
    assert should_log(step, pending=pending, every=50, at_end=at_end) is due


@pytest.mark.parametrize(
    ("step", "evaluated", "at_end", "stopping", "due"),
    [
        (6, 0, False, False, True),
        (7, 6, False, False, False),
        (12, 12, False, False, False),  # a restart right after an evaluation
        (13, 12, True, False, True),
        (12, 6, False, True, False),  # it is done when the run is resumed
        (0, 0, False, False, False),
    ],
)
def test_should_evaluate(
    step: int, evaluated: int, at_end: bool, stopping: bool, due: bool
) -> None:
    actual = should_evaluate(step, evaluated=evaluated, every=6, at_end=at_end, stopping=stopping)
    assert actual is due


@pytest.mark.parametrize(
    ("step", "saved", "at_end", "stopping", "save_now", "due"),
    [
        (5, 3, False, False, False, False),
        (5, 3, True, False, False, True),
        (5, 3, False, True, False, True),
        (5, 3, False, False, True, True),
        (5, 5, True, True, True, False),  # nothing new
        (0, -1, False, True, False, True),  # a signal before the first step
    ],
)
def test_should_save(
    step: int, saved: int, at_end: bool, stopping: bool, save_now: bool, due: bool
) -> None:
    actual = should_save(step, saved=saved, at_end=at_end, stopping=stopping, save_now=save_now)
    assert actual is due


@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        ({"cross_entropy": {}}, []),
        ({"cross_entropy": {"weight": 0.5}}, ["cross_entropy"]),
        ({"cross_entropy": {"weight": 0.3}, "bce": {"weight": 0.7}}, ["cross_entropy", "bce"]),
    ],
)
def test_log_line_shows_the_terms_of_the_loss(
    tmp_path: Path, recipe: RecipeMaker, losses: dict[str, Any], shown: list[str]
) -> None:
    output = train(recipe(run={"epochs": 1}, losses=losses), cwd=tmp_path)
    for record in lines(tmp_path / "runs/tiny"):
        if record["kind"] == "train":
            terms = ", ".join(f"{name} {record[name]:.4f}" for name in shown)
            loss = f"{record['loss']:.4f}" + (f" ({terms})" if shown else "")
            assert f"  loss {loss}  top1 " in output
