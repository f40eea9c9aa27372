"""Read and write metrics.jsonl, one flat JSON object per line."""

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
    """The metrics.jsonl of a run; each record has `kind`, `step` and `epoch`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Record) -> None:
        """Append a record. It survives a crash of the process, and of the machine after `sync`."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        with with_path(self.path), self.path.open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Flush all records to disk. Call it before saving a checkpoint that follows them."""
        if self.path.exists():
            with with_path(self.path), self.path.open("a") as file:
                os.fsync(file.fileno())

    def read(self) -> list[Record]:
        """Return all records. A last line that a crash left incomplete or as zeros is ignored.

        UserError for any other unreadable line, since dropping it would lose data.
        """
        if not self.path.exists():
            return []
        *lines, rest = self.path.read_bytes().rstrip(b"\0").split(b"\n")
        records = []
        for number, line in enumerate(lines, 1):
            record = _parse(line)
            if record is None:
                raise UserError(
                    f"{self.path}:{number}: damaged line; restore the file or delete the line"
                )
            records.append(record)
        last = _parse(rest)
        return records if last is None else [*records, last]

    def truncate(self, step: int, evaluated: int) -> int:
        """Drop the records that follow a checkpoint; return the step of the last evaluation, or 0.

        `step` is the step of the checkpoint, and `evaluated` that of the last evaluation before it:
        an evaluation at `step` itself may have run after the checkpoint was saved.
        """
        kept = [
            record
            for record in self.read()
            if record["step"] <= (evaluated if record["kind"] == "eval" else step)
        ]
        if self.path.exists():
            atomic_write(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        return max((record["step"] for record in kept if record["kind"] == "eval"), default=0)


def _parse(line: bytes) -> Record | None:
    """Return the record, or None for a line that `append` cannot have written."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if (
        isinstance(record, dict)
        and isinstance(record.get("kind"), str)
        and isinstance(record.get("step"), int)
        and isinstance(record.get("epoch"), int | float)
        and all(math.isfinite(value) for value in record.values() if isinstance(value, float))
    ):
        return record
    return None
