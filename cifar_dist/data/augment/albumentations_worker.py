"""Floor 1. A worker process of `augment.albumentations`: fills its rows of a view, then waits to be told the next.

Started by host_pictures.py with SIGTERM, SIGUSR1 and SIGINT blocked: Slurm signals every process of
a job, and pictures are needed until the run has saved. It ends when its parent does.
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
LOOK_EVERY = 32  # pictures between two looks at the parent


def main() -> int:
    """Read what to be from the first line of stdin, and a view to fill from each further one."""
    stops = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for number in stops:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
    sys.modules["torch"] = None  # type: ignore[assignment]  # albumentations would import it: 500 MB
    spec = json.loads(sys.stdin.readline())
    layout, file, me = Layout(**spec["layout"]), spec["file"], spec["worker"]
    try:
        pipeline = Pipeline(spec["pipeline"], trials=0)  # its parent has tried it
        source, *slots = layout.pages(file)
        sys.stdout.write(READY)
        sys.stdout.flush()
        filled = [-1, -1]
        for line in sys.stdin:
            slot, view, seed = json.loads(line)
            if filled[slot] != view:
                for row in layout.rows_of(me):
                    if row % LOOK_EVERY == 0 and os.getppid() != spec["parent"]:
                        return 1
                    slots[slot][row] = pipeline(source[row], seed, row)
            filled[slot] = view
            layout.tell(file, slot, me, view)
    except UserError as error:
        print(error, flush=True)
        return 2
    return 0
