"""Imports point down, each library is imported in one place, and hot modules are light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cifar_dist"
PACKAGES = [  # from the bottom to the top; commands stand above all
    *("utils", "distributed", "data", "models", "losses", "optim", "distill", "evaluation"),
    *(
        "run_folder",
        "tracking",
        "recipe",
        "training",
        "tuning",
        "inference",
        "exporting",
        "reporting",
    ),
]
COMMAND, API = len(PACKAGES), len(PACKAGES) + 1
MODULES = sorted(PACKAGE.rglob("*.py"))


def level(parts: tuple[str, ...]) -> int:
    """Return the level of cifar_dist/<parts>; `__init__` is below everything."""
    if not parts or parts[0] in ("__init__", "__version__"):
        return -1
    if parts[0] == "api":
        return API
    return PACKAGES.index(parts[0]) if parts[0] in PACKAGES else COMMAND


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
    """A package imports itself and what is below it; a command imports no other command."""
    here = level(path.relative_to(PACKAGE).with_suffix("").parts)
    for name in imports(path):
        if name.startswith("cifar_dist."):
            there = level(tuple(name.split(".")[1:]))
            assert there < here or there == here < COMMAND, f"{path.name} imports {name}"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("timm", {"models", "optim/optimizer.py"}),
        ("accelerate", {"distributed", "recipe/session.py", "training", "train.py"}),
        ("wandb", {"tracking"}),
        ("datasets", {"data/dataset.py", "data/ingest/own_images.py"}),
        ("pydantic", {"recipe"}),
        ("optuna", {"tuning"}),
        ("yaml", {"recipe", "utils/strict_yaml.py"}),
        ("albumentations", {"data/augment/albumentations_pipeline.py"}),
        ("cv2", {"data/augment/albumentations_pipeline.py", "data/corruptions.py"}),
        ("pickle", {"data/ingest/synthetic.py", "data/ingest/safe_pickle.py"}),
    ],
)
def test_libraries_are_imported_in_one_place(library: str, homes: set[str]) -> None:
    for path in MODULES:
        place = path.relative_to(PACKAGE).as_posix()
        if any(name.split(".")[0] == library for name in imports(path)):
            assert place in homes or place.split("/")[0] in homes, f"{place} imports {library}"


def test_hot_modules_are_light() -> None:
    """Modules below recipe/ import nothing slow; timm imports wandb if it is installed."""
    heavy = ["datasets", "albumentations", "cv2", "pandas"]
    script = (
        "import sys, cifar_dist.training.objective, cifar_dist.training.state\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
