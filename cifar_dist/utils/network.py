"""Floor 0. Nobody waits for a network that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable

RESPONSE_SECONDS = 3


def responds(call: Callable[[], object]) -> bool:
    """Whether `call` ends within 3 seconds without an OSError; what takes longer is left to itself.

    Timeouts of sockets begin after the name has been looked up, which takes 10 seconds where a name
    server is configured that does not answer, as on nodes without a network.
    """
    done: list[bool] = []

    def run() -> None:
        try:
            call()
        except OSError:
            return
        done.append(True)

    thread = threading.Thread(target=run, daemon=True, name="network")
    thread.start()
    thread.join(RESPONSE_SECONDS)
    return bool(done)
