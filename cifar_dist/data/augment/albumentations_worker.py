"""A worker process of `augment.albumentations`, which fills its rows of one view after another.

albumentations_buffer.py starts it with SIGTERM, SIGUSR1 and SIGINT blocked: Slurm signals every
process of a job, but the images are needed until the run has saved. It exits when its parent does.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from cifar_dist.data.augment.albumentations_pipeline import Pipeline
from cifar_dist.data.augment.shared_memory import Layout
from cifar_dist.utils.errors import UserError

READY = "ready\n"
CHECK_EVERY = 32  # images between two checks that the parent is alive


def main() -> int:
    """Read the settings from the first line of stdin and a view to fill from each further line."""
    stop_signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for number in stop_signals:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals)
    sys.modules["torch"] = None  # type: ignore[assignment]  # stop albumentations importing it: 500 MB
    spec = json.loads(sys.stdin.readline())
    layout, file, worker = Layout(**spec["layout"]), spec["file"], spec["worker"]
    try:
        pipeline = Pipeline(
            spec["pipeline"], image_size=layout.image_size, trials=0
        )  # tested by the parent
        source, *slots = layout.pages(file)
        sys.stdout.write(READY)
        sys.stdout.flush()
        filled = [-1, -1]
        for line in sys.stdin:
            slot, view, seed = json.loads(line)
            if filled[slot] != view:
                for row in layout.rows_of(worker):
                    if row % CHECK_EVERY == 0 and os.getppid() != spec["parent"]:
                        return 1
                    slots[slot][row] = pipeline(source[row], seed, row)
            filled[slot] = view
            layout.mark_filled(file, slot, worker, view)
    except UserError as error:
        print(error, flush=True)
        return 2
    return 0
