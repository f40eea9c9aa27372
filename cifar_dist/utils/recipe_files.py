"""Find and read recipe files without validating them. Imports nothing slow: `cifar-dist` uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cifar_dist
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.strict_yaml import parse_yaml
from cifar_dist.utils.suggest import closest

MAX_BYTES = 1 << 16
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


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file as plain data, not validated."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES} bytes: not a recipe")
        text = path.read_text()
    except FileNotFoundError:
        raise missing_recipe(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    raw = parse_yaml(text, where=str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping with a `name`")
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in plain data, creating missing sections."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(
            f"{override!r}: overrides have the form section.key=value, like run.epochs=2"
        )
    *sections, last = dotted.split(".")
    node = raw
    for section in sections:
        child = node.get(section)
        if child is not None and not isinstance(child, dict):
            raise UserError(f"{override!r}: {section} is not a section")
        node[section] = node = child or {}
    node[last] = parse_yaml(text, where=override)
