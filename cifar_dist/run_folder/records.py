"""Records of a run: metrics.jsonl, one flat JSON object per line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import atomic_write, with_path

Record = dict[str, Any]


class MetricsFile:
    """metrics.jsonl, the truth about a run: every line is flat and has kind, step and epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Record) -> None:
        """Add a line. It survives this process, and this machine after `sync`."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        with with_path(self.path), self.path.open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Put all lines on the disk, before a checkpoint that has seen them: none may be missing then."""
        if self.path.exists():
            with with_path(self.path), self.path.open("a") as file:
                os.fsync(file.fileno())

    def read(self) -> list[Record]:
        """The lines; a last one that a crash left unfinished, or as zeros, is left out.

        UserError for any other that cannot be read, since what is after it would be lost.
        """
        if not self.path.exists():
            return []
        *finished, rest = self.path.read_bytes().rstrip(b"\0").split(b"\n")
        lines = []
        for number, text in enumerate(finished, 1):
            line = _parsed(text)
            if line is None:
                raise UserError(
                    f"{self.path}:{number}: this line is damaged; restore the file, or take the line out"
                )
            lines.append(line)
        last = _parsed(rest)
        return lines if last is None else [*lines, last]

    def truncate(self, step: int, evaluated: int) -> int:
        """Drop what a checkpoint at `step` has not seen; the step of the last evaluation that remains, or 0.

        `evaluated`: the last evaluation that it has seen. One at its own step may have come later.
        """
        kept = [
            line
            for line in self.read()
            if line["step"] <= (evaluated if line["kind"] == "eval" else step)
        ]
        if self.path.exists():
            atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        return max((line["step"] for line in kept if line["kind"] == "eval"), default=0)


def _parsed(text: bytes) -> Record | None:
    """A line of metrics.jsonl, or None for what `append` never wrote."""
    try:
        line = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    if (
        isinstance(line, dict)
        and isinstance(line.get("kind"), str)
        and isinstance(line.get("step"), int)
        and isinstance(line.get("epoch"), int | float)
        and all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    ):
        return line
    return None
