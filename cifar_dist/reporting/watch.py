"""Rewrite the report page while runs train."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from cifar_dist.inference.stored_run import Run, read_runs
from cifar_dist.utils.files import atomic_write
from cifar_dist.utils.log import log

WATCH_SECONDS = 5
REFRESH_SECONDS = 15  # after which the browser loads the page again
WATCHED_FILES = ("metrics.jsonl", "summary.json", "recipe.yaml")


def watch(
    find: Callable[[], Sequence[Path]],
    render: Callable[..., str],
    output: Path,
    *,
    seconds: float = WATCH_SECONDS,
) -> list[Run]:
    """Rewrite the short page when a run has changed; return the runs when all have finished, or at Ctrl-C.

    `find` returns the run folders, which may become more; `render` is `render_page`.
    """
    seen, runs = None, read_runs(find())
    log.disabled = True  # the same warnings would be repeated
    try:
        while not all(run.is_finished for run in runs):
            folders = find()
            if (times := modification_times(folders)) != seen:
                seen, runs = times, read_runs(folders)
                atomic_write(output, render(runs, refresh_seconds=REFRESH_SECONDS))
            time.sleep(seconds)
    except KeyboardInterrupt:
        pass
    finally:
        log.disabled = False
    return runs


def modification_times(folders: Iterable[Path]) -> dict[Path, int]:
    times = {}
    for file in (folder / name for folder in folders for name in WATCHED_FILES):
        with suppress(FileNotFoundError):
            times[file] = file.stat().st_mtime_ns
    return times
