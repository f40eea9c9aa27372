"""What one rank alone cannot mend ends all ranks: one sentence, exit code 2, and nobody waits in a collective."""

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
from cifar_dist.utils.errors import USER_ERROR, UserError, print_error, user_message

TICK_SECONDS, POLL_SECONDS = 1.0, 0.05
SAME_SECONDS = 2.0  # in which ranks that make the same mistake make it
EXIT_SECONDS = 3.0  # a rank that hangs lets no more than this pass


@contextmanager
def propagate_errors(accelerator: Accelerator) -> Iterator[None]:
    """All ranks leave together, at the end or with the sentence of a UserError or an error of the storage.

    One that all meet is rank 0's to say. One that a rank meets alone it says itself, with its name, and
    the others, which would wait for it, end too.
    """
    if accelerator.num_processes == 1:
        with translate_oom():
            yield
        destroy_distributed(accelerator)
        return
    ending = ErrorChannel(accelerator.process_index, accelerator.num_processes)
    try:
        with translate_oom():
            yield
        destroy_distributed(accelerator)
    except (UserError, OSError) as error:
        sentence = user_message(error)
        if sentence is None:
            raise
        ending.over.set()
        ending.report(sentence)
        if "--traceback" in sys.argv:
            raise
        # Not by sys.exit: NCCL's destructors may wait for a collective that the others have left.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, AttributeError):  # a closed one has no reader, or is None
                stream.flush()
        os._exit(USER_ERROR)
    except RuntimeError:  # of a collective that another rank has left
        ending.exit_if_reported()
        raise
    finally:
        ending.over.set()


@contextmanager
def translate_oom() -> Iterator[None]:
    """The sentence for who needs more memory than there is, where nobody nearer by has a better one."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory ({str(error).splitlines()[0] if str(error) else 'no more is there'}); look "
            "what else is on the device, or make less of the run: a smaller model, a teacher with "
            "placement: sharded or cached, data.place=host"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine had no more memory to give; on a CPU torch has no own error."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("can't allocate memory", "not enough memory"))
    )


class ErrorChannel:
    """Ranks meet where they met at the start, in the store that rank 0 or the launcher keeps."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.over = threading.Event()
        self.store = _get_default_store().clone()  # a connection for each thread
        heard = _get_default_store().clone()
        threading.Thread(target=self._listen, args=(heard,), daemon=True, name="ending").start()

    def _listen(self, heard: dist.Store) -> None:
        with suppress(RuntimeError):  # the store is gone, and with it the run
            while not self.over.wait(TICK_SECONDS):
                if heard.check(["ending/said"]):
                    self._leave(heard)
                    os._exit(USER_ERROR)

    def exit_if_reported(self) -> None:
        """End like the others where one of them has said why before this rank could listen."""
        with suppress(RuntimeError):
            if self.store.check(["ending/said"]):
                os._exit(USER_ERROR)

    def report(self, sentence: str) -> None:
        """Say it, if no other rank does, and wait until the others know."""
        me = f"rank {self.rank} ({socket.gethostname()}, process {os.getpid()})"
        try:
            self.store.set(_failed(self.rank), "")
            if _until(self.store, [_failed(0 if self.rank else 1)], SAME_SECONDS):  # all met it
                speaks = self.rank == 0
            else:
                speaks = self.store.add("ending/alone", 1) == 1
                sentence = f"{me}: {sentence}"
        except RuntimeError:
            speaks = True
        if speaks:
            print_error(sentence)
        with suppress(RuntimeError):
            if speaks:
                self.store.set("ending/said", "")
            self._leave(self.store)

    def _leave(self, store: dist.Store) -> None:
        """Wait for all others: who breaks a connection early makes them fail in their own words."""
        with suppress(RuntimeError):
            if self.rank:
                store.set(_left(self.rank), "")
                _until(store, [_left(0)], EXIT_SECONDS)
            else:
                _until(store, [_left(rank) for rank in range(1, self.world_size)], EXIT_SECONDS)
                store.set(_left(0), "")
                time.sleep(4 * POLL_SECONDS)  # a store that goes while it is asked makes torch warn


def _failed(rank: int) -> str:
    return f"ending/failed/{rank}"


def _left(rank: int) -> str:
    return f"ending/left/{rank}"


def _until(store: dist.Store, keys: list[str], seconds: float) -> bool:
    """Whether somebody has set all of the keys in time; store.wait would warn of its timeout."""
    deadline = time.monotonic() + seconds
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True
