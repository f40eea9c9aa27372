"""Network checks with a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable

RESPONSE_SECONDS = 3


def responds(call: Callable[[], object]) -> bool:
    """Return whether `call` succeeds within 3 seconds; an OSError counts as failure.

    A socket timeout is not enough: it does not cover name resolution, which takes 10 s on nodes
    whose name server does not answer. A call that takes longer continues in a daemon thread.
    """
    succeeded = threading.Event()

    def run() -> None:
        try:
            call()
        except OSError:
            return
        succeeded.set()

    thread = threading.Thread(target=run, daemon=True, name="network")
    thread.start()
    thread.join(RESPONSE_SECONDS)
    return succeeded.is_set()
