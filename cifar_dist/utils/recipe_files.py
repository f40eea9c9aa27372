"""Find recipe files. Imports only the standard library: a mistake in a path is reported at once."""

from __future__ import annotations

from pathlib import Path

import cifar_dist
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.suggest import closest

RECIPES = Path(cifar_dist.__file__).parent / "recipes"  # in a checkout a symbolic link to recipes/


def recipe_names() -> list[str]:
    """Return the names of all recipes that come with cifar_dist, like `r18_32` and `kd/resnet8x4`."""
    files = [*RECIPES.glob("*.yaml"), *RECIPES.glob("*/*.yaml")]
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in files)


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: a path, or the name of one that comes with cifar_dist."""
    path = Path(name)
    if path.is_file():
        return path
    if name in recipe_names():
        return RECIPES / f"{name}.yaml"
    raise missing_recipe(path)


def missing_recipe(path: Path) -> UserError:
    near = closest(path.stem, (file.stem for file in path.parent.glob("*.yaml")))
    if near:
        return UserError(f"{path}: no such recipe; did you mean {path.parent / near}.yaml?")
    if near := closest(path.stem, recipe_names()):
        return UserError(f"{path}: no such recipe; did you mean {near}?")
    return UserError(f"{path}: no such recipe; `cifar-dist recipes` lists those that exist")
