"""The Dockerfile, as far as it can be checked without an engine: what it copies, installs and runs as."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text()
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def test_all_that_is_copied_is_there_and_not_ignored(instructions: list[tuple[str, str]]) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for verb, rest in instructions:
        if verb == "COPY":
            *sources, _ = rest.split()
            for source in sources:
                assert (ROOT / source).exists()
                assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored)
    for needed in ("recipes", "accelerate_configs", "cifar_dist", "slurm/train.sh"):
        assert (ROOT / needed).exists()
        assert not any(fnmatch.fnmatch(needed, pattern) for pattern in ignored)


def test_it_installs_our_versions_and_runs_as_nobody_special(
    instructions: list[tuple[str, str]],
) -> None:
    verbs = [verb for verb, _ in instructions]
    assert verbs[:2] == ["ARG", "FROM"]
    said = dict(instructions)
    assert "cuda" in said["ARG"]
    (install,) = [rest for verb, rest in instructions if "pip install" in rest]
    assert "-c constraints.txt" in install
    users = [rest for verb, rest in instructions if verb == "USER"]
    assert users == ["10001"]  # by number, so that a cluster can see that it is not root
    assert verbs.index("USER") > max(place for place, verb in enumerate(verbs) if verb == "RUN")
    assert json.loads(said["ENTRYPOINT"])[0] == "tini"
    assert json.loads(said["CMD"])[:3] == ["python", "-m", "cifar_dist.train"]
