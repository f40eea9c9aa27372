"""If one rank hits an error that the user can fix, stop all ranks with one message and exit code 2."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.distributed_c10d import _get_default_store

from cifar_dist.distributed.launch import destroy_distributed
from cifar_dist.utils.errors import USER_ERROR, UserError, first_line, print_error, user_message

TICK_SECONDS, POLL_SECONDS = 1.0, 0.05
SAME_SECONDS = 2.0  # ranks that hit the same error do so within this time
EXIT_SECONDS = 3.0  # the longest wait for ranks that hang

REPORTED = "errors/reported"  # keys in the ranks' store
CLAIMED = "errors/claimed"


@contextmanager
def propagate_errors(accelerator: Accelerator) -> Iterator[None]:
    """End all ranks together: by leaving the process group, or after a user error on any of them.

    An error that all ranks hit is printed by rank 0. An error of one rank is printed by that rank,
    with its name, and ends the other ranks, which would wait for it in a collective.
    """
    if accelerator.num_processes == 1:
        with translate_oom():
            yield
        destroy_distributed(accelerator)
        return
    channel = ErrorChannel(accelerator.process_index, accelerator.num_processes)
    try:
        with translate_oom():
            yield
        channel.close()  # while rank 0 still serves the store
        destroy_distributed(accelerator)
    except (UserError, OSError) as error:
        message = user_message(error)
        if message is None:
            raise
        channel.closed.set()
        channel.report(message)
        if "--traceback" in sys.argv:
            raise
        # sys.exit would run NCCL's destructors, which may wait for a collective that others left.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, AttributeError):  # closed by its reader, or None
                stream.flush()
        os._exit(USER_ERROR)
    except RuntimeError:  # of a collective that another rank has left
        channel.exit_if_reported()
        raise
    finally:
        channel.close()


@contextmanager
def translate_oom() -> Iterator[None]:
    """Turn an out-of-memory error into a UserError; the watchdog's is more specific in training."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory ({first_line(error)}); check what else uses the device, or use less: a "
            "smaller model, a teacher with placement: sharded or cached, data.place=host"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Return whether device or host memory ran out; on a CPU torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("can't allocate memory", "not enough memory"))
    )


class ErrorChannel:
    """Exchange of errors over the store that the ranks used to form the process group."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.closed = threading.Event()
        self.store = _get_default_store().clone()  # each thread needs its own connection
        store = _get_default_store().clone()
        self.thread = threading.Thread(
            target=self._listen, args=(store,), daemon=True, name="errors"
        )
        self.thread.start()

    def _listen(self, store: dist.Store) -> None:
        with suppress(RuntimeError):  # the store has closed because the run has ended
            while not self.closed.wait(TICK_SECONDS):
                if store.check([REPORTED]):
                    self._leave(store)
                    os._exit(USER_ERROR)

    def close(self) -> None:
        """Stop listening. A thread inside the store's C++ code would abort the interpreter's exit."""
        self.closed.set()
        self.thread.join(EXIT_SECONDS)

    def exit_if_reported(self) -> None:
        """Exit if another rank has reported an error that the listening thread has not seen yet."""
        with suppress(RuntimeError):
            if self.store.check([REPORTED]):
                os._exit(USER_ERROR)

    def report(self, message: str) -> None:
        """Print the error unless another rank does, and wait until the other ranks know of it."""
        try:
            self.store.set(_failed(self.rank), "")
            peer = 0 if self.rank else 1
            if _wait_for(self.store, [_failed(peer)], SAME_SECONDS):  # all ranks hit it
                prints = self.rank == 0
            else:
                prints = self.store.add(CLAIMED, 1) == 1
                message = f"{rank_name(self.rank)}: {message}"
        except RuntimeError:
            prints = True
        if prints:
            print_error(message)
        with suppress(RuntimeError):
            if prints:
                self.store.set(REPORTED, "")
            self._leave(self.store)

    def _leave(self, store: dist.Store) -> None:
        """Wait for all ranks: one that exits early makes collectives of the others fail."""
        with suppress(RuntimeError):
            if self.rank:
                store.set(_left(self.rank), "")
                _wait_for(store, [_left(0)], EXIT_SECONDS)
            else:
                _wait_for(store, [_left(rank) for rank in range(1, self.world_size)], EXIT_SECONDS)
                store.set(_left(0), "")
                time.sleep(4 * POLL_SECONDS)  # torch warns if the store closes during a request


def rank_name(rank: int) -> str:
    """Return a rank with its host and process id, for messages."""
    return f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"


def _failed(rank: int) -> str:
    return f"errors/failed/{rank}"


def _left(rank: int) -> str:
    return f"errors/left/{rank}"


def _wait_for(store: dist.Store, keys: list[str], seconds: float) -> bool:
    """Return whether all keys are set in time; `store.wait` would log a warning on its timeout."""
    deadline = time.monotonic() + seconds
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True
