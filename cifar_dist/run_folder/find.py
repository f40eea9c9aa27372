"""Find run folders. Imports nothing slow: `runs` uses it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Return the run folders among `paths`, and those in folders that contain some, each once.

    Plain files are ignored and other folders skipped with a warning, because `runs/*` may match them.
    UserError if a path does not exist, or if there is no run folder.
    """
    runs: dict[Path, None] = {}
    for path in paths:
        if path.is_file():
            continue
        if not path.exists():
            raise UserError(
                f"{path} is not a run folder (it does not exist); give one, like runs/debug"
            )
        found = [path] if _is_run(path) else sorted(filter(_is_run, path.glob("[!.]*")))
        if not found:
            log.warning(f"skipped: {path} is not a run folder (no recipe.yaml in it)")
        runs |= dict.fromkeys(found)
    if not runs:
        raise UserError("none of these is a run folder; give some, like runs/debug")
    return list(runs)


def _is_run(folder: Path) -> bool:
    return os.path.exists(folder / "recipe.yaml")  # False for a folder that cannot be read
