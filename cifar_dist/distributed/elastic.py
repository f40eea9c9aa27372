"""Work as a rank of torchrun's elastic agents: `torchrun --nnodes=1:2 --max-restarts=100 ...`.

An agent starts its ranks again when one fails, or when another agent disappears or joins, with the ranks
that are left. They continue from the newest checkpoint like any other start.
"""

from __future__ import annotations

import os
import signal

from cifar_dist.distributed import signals


def restarts_on_failure() -> bool:
    """Return whether an agent starts this rank again after a failure."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def stop_with_agent() -> None:
    """Receive SIGTERM if the agent is killed: an orphan would keep the lock of the run."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signals.signal_at_parent_exit()


def stop_agent() -> None:
    """End the agent, which would start this rank again, although that cannot help or is not wanted."""
    if restarts_on_failure() and os.environ["LOCAL_RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
