"""Write the commands that repeat a run."""

from __future__ import annotations

import re
import shlex
from typing import Any

from cifar_dist.inference.stored_run import Run
from cifar_dist.recipe.schema import Recipe, to_dict, to_yaml

COMMIT = re.compile(r"[0-9a-f]{7,40}\+?")  # of environment.json; + if files were modified


def reproduce(run: Run) -> str:
    """Return a shell script that trains a run again: commit, recipe and command.

    Values from the run folder are quoted, or in comments without line breaks.
    """
    environment, recipe = run.environment, run.recipe
    processes = run.summary.get("world_size") or environment.get("world_size") or 1
    packages = environment.get("packages")
    pairs = packages.items() if isinstance(packages, dict) else ()
    versions = " ".join(f"{name}=={version}" for name, version in pairs if version)
    teachers = zip(recipe.all_teachers, environment.get("teachers") or (), strict=False)
    file, commit = f"{recipe.name}.yaml", str(environment.get("commit") or "")
    plural = "process" if processes == 1 else "processes"
    command = ["cifar-dist", "train", file]
    if run.origin:
        command += ["--fork", run.origin["run"]]
    if processes != 1:
        command += ["--processes", str(processes)]
    return "\n".join(
        [
            comment(f"hardware: {environment.get('hardware', 'unknown')}, {processes} {plural}"),
            comment(f"Python {environment.get('python', '?')} {versions}"),
            comment(f"data: SHA-256 {environment.get('data', 'unknown')}"),
            *(comment(f"teacher {teacher.run}: SHA-256 {sha}") for teacher, sha in teachers),
            checkout(commit) if COMMIT.fullmatch(commit) else comment("unknown commit"),
            f"cat > {file} <<'END'",
            *to_yaml(minimal(recipe)).splitlines(),
            "END",
            shlex.join(command),
        ]
    )


def comment(text: str) -> str:
    return "# " + " ".join(text.split())


def checkout(commit: str) -> str:
    command = f"git checkout {commit.removesuffix('+')}"
    return f"{command}   # files were modified" if commit.endswith("+") else command


def minimal(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as a nested dict of the name, the seed and what differs from the defaults."""
    changed = without_defaults(to_dict(recipe), to_dict(Recipe(name=recipe.name)))
    run = {"seed": recipe.run.seed} | changed.pop("run", {})
    return {"name": recipe.name, "run": run, **changed}


def without_defaults(value: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Return what differs from `default`.

    A mapping with other keys (like `losses`) is kept whole, since it replaces the default one.
    """
    changed = {}
    for name, item in value.items():
        usual = default.get(name)
        if item == usual:
            continue
        if isinstance(item, dict) and isinstance(usual, dict) and item.keys() == usual.keys():
            item = without_defaults(item, usual)
        changed[name] = item
    return changed
