"""The Dockerfile, as far as it can be tested without a container engine."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build_context(tmp_path: Path) -> Path:
    """Return a copy of the files that .dockerignore leaves in the build context."""
    patterns = (ROOT / ".dockerignore").read_text().split()

    def ignore(folder: str, names: list[str]) -> set[str]:
        active = [pattern.removeprefix("**/") for pattern in patterns]
        if Path(folder) != ROOT:  # only **/ patterns apply below the root
            active = [p.removeprefix("**/") for p in patterns if p.startswith("**/")]
        return {name for name in names for p in active if fnmatch.fnmatch(name, p)}

    return shutil.copytree(ROOT, tmp_path / "app", ignore=ignore)


def instruction(name: str) -> str:
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    return re.findall(rf"^{name} (.*)", text, re.MULTILINE)[-1]


def test_copied_files_can_train(build_context: Path) -> None:
    """The image's default command, and a dry run, work with the copied files alone."""
    assert not (build_context / "data").exists()
    python, *default = json.loads(instruction("CMD"))
    assert python == "python"
    for arguments in (default, ["-m", "cifar_dist.train", "--dry-run", "recipes/debug.yaml"]):
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=build_context,
            env=os.environ | {"PYTHONPATH": str(build_context)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr


def test_install_layer_builds_with_known_extras(tmp_path: Path) -> None:
    """Dependencies are installed before the sources are copied, from a few files."""
    pytest.importorskip("setuptools", minversion="77")
    text = (ROOT / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (?!\. )(.*)", text, re.MULTILINE):
        *files, target = sources.split()
        (tmp_path / target).mkdir(exist_ok=True)
        for file in files:
            shutil.copy(ROOT / file, tmp_path / target)
    script = "import setuptools.build_meta as build; print(build.prepare_metadata_for_build_editable('.'))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    metadata = next(tmp_path.glob("*.dist-info/METADATA")).read_text()
    installed = re.search(r"\.\[([^\]]*)\]", instruction("RUN python3"))
    assert installed
    for extra in installed[1].split(","):  # pip only warns about an unknown one
        assert f"Provides-Extra: {extra}\n" in metadata
