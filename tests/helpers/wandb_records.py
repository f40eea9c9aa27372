"""Read the offline files of wandb."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

from cifar_dist.tracking.tracker import wandb_run_id


def records(run: Path) -> list[dict[str, Any]]:
    """Return the rows copied from metrics.jsonl."""
    return [row for row in rows_of(all_records(run)) if row.keys() & {"train/epoch", "eval/epoch"}]


def all_records(run: Path) -> list[Any]:
    """Return all records of the run's own offline file."""
    (path,) = run.glob(f"wandb/offline-run-*-{wandb_run_id(run)}/*.wandb")
    return records_of(path)


def rows_of(actual: list[Any]) -> list[dict[str, Any]]:
    histories = [one.history.item for one in actual if one.WhichOneof("record_type") == "history"]
    return [
        {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
        for items in histories
    ]


def records_of(path: Path) -> list[Any]:
    """Return the records of an offline file."""
    actual = []
    for content in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        actual.append(record)
    return actual


def log_records(file: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log after wandb's header of seven bytes; long ones are split."""
    place, parts = 7, b""
    while place + 7 <= len(file):
        left_in_block = 32768 - place % 32768
        if left_in_block < 7:
            place += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", file[place : place + 7])
        parts += file[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            yield parts
            parts = b""
