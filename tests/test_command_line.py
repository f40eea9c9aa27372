"""A command takes its recipe, changes and options in any order, and says what is missing."""

from __future__ import annotations

import itertools

import pytest

from cifar_dist import cache_logits, train
from cifar_dist.errors import UserError


@pytest.mark.parametrize(
    "words", list(itertools.permutations(["run.epochs=3", "--dry-run", "run.seed=7"]))
)
def test_options_may_stand_among_the_changes(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["recipes/debug.yaml", *words]) == 0
    said = capsys.readouterr().out
    assert "run: {epochs: 3," in said
    assert "seed: 7," in said


@pytest.mark.parametrize("command", [train, cache_logits])
def test_only_the_recipe_is_missing(command) -> None:
    with pytest.raises(UserError, match=r"required: recipe; "):
        command.main(["--force"])
