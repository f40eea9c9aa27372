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
TAIL_BYTES = 1 << 16  # hundreds of records


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

    def read(self, *, tail: int | None = None) -> list[Record]:
        """Return all records, or those in the last `tail` bytes.

        A last line that a crash left incomplete or as zeros is ignored. UserError for any other
        unreadable line, since dropping it would lose data.
        """
        *lines, rest = self._read_bytes(tail).rstrip(b"\0").split(b"\n")
        records = []
        for number, line in enumerate(lines, 1):
            record = _parse(line)
            if record is None and tail:
                return self.read()  # for the number of the line
            if record is None:
                raise UserError(
                    f"{self.path}:{number}: damaged line; restore the file or delete the line"
                )
            records.append(record)
        last = _parse(rest)
        return records if last is None else [*records, last]

    def newest(self, *kinds: str) -> dict[str, Record]:
        """Return the newest record of each of `kinds` that exists, by kind.

        Fast for long files: only the last TAIL_BYTES are checked for damage, as in `read`.
        """
        newest = {record["kind"]: record for record in self.read(tail=TAIL_BYTES)}
        for tail in (16 * TAIL_BYTES, None):
            for kind in set(kinds) - newest.keys():
                complete, _, _ = self._read_bytes(tail).rpartition(b"\n")
                _, found, after = complete.rpartition(f'{{"kind": "{kind}"'.encode())
                if found and (record := _parse(found + after.partition(b"\n")[0])):
                    newest[kind] = record
        return newest

    def _read_bytes(self, tail: int | None) -> bytes:
        """Return the complete lines in the last `tail` bytes, or the whole file; empty if absent."""
        try:
            with self.path.open("rb") as file:
                start = max(0, file.seek(0, os.SEEK_END) - tail) if tail else 0
                file.seek(start)
                content = file.read()
        except FileNotFoundError:
            return b""
        return content.partition(b"\n")[2] if start else content

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
