"""The floors of the house: imports only point down, one home for each library, light hot modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cifar_dist"
FLOORS = {"data": 1, "nets": 1, "learn": 2, "engine": 3, "recipe": 4}
GROUND = {
    "command_line",
    "config",
    "errors",
    "files",
    "keys",
    "network",
    "signals",
    "strict_yaml",
    "unknown_keys",
    "__init__",
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def floor(parts: tuple[str, ...]) -> int:
    """The floor of cifar_dist/<parts>; what lies beside train.py and is not ground is a command."""
    if not parts or parts[0] in GROUND:
        return 0
    return FLOORS.get(parts[0], 5)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = floor(path.relative_to(PACKAGE).with_suffix("").parts)
    for name in imports(path):
        if name.startswith("cifar_dist."):
            assert floor(tuple(name.split(".")[1:])) <= here, f"{path.name} imports {name}"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("timm", {"nets/backbones.py", "nets/timm_folder.py", "learn/optim.py"}),
        ("accelerate", {"engine", "training", "train.py"}),
        ("wandb", {"engine"}),
        ("datasets", {"data/arrow.py"}),
        ("pydantic", {"recipe.py"}),
        ("yaml", {"recipe.py", "strict_yaml.py"}),
        ("albumentations", {"data/host_pipeline.py"}),
        ("cv2", {"data/host_pipeline.py"}),
        ("pickle", {"data/sample.py", "data/pickle_machine.py"}),
    ],
)
def test_each_library_has_a_home(library: str, homes: set[str]) -> None:
    for path in MODULES:
        place = path.relative_to(PACKAGE).as_posix()
        if any(name.split(".")[0] == library for name in imports(path)):
            assert place in homes or place.split("/")[0] in homes, f"{place} imports {library}"


def test_a_modules_first_line_says_its_place() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_hot_modules_are_light() -> None:
    """Nothing below the recipe imports what is slow; timm itself imports wandb where it finds it."""
    heavy = ["datasets", "albumentations", "cv2", "pandas"]
    script = (
        "import sys, cifar_dist.learn.objective, cifar_dist.engine.state\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
