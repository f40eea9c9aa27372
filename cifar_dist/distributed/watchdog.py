"""End a run in which a rank hangs, dies or fails, with a message that names the rank."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from torch.distributed.distributed_c10d import _get_default_store

from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.error_propagation import is_out_of_memory, rank_name
from cifar_dist.utils.errors import UserError, user_message
from cifar_dist.utils.process import host_id, process_start_time

TICK_SECONDS = 1.0
CHECK_SECONDS = 2.0  # a rank that responds sends a heartbeat within this time
GRACE_SECONDS = 2  # the longest exit of an interpreter whose collectives failed


class HasStep(Protocol):
    step: int  # optimizer steps done
    saved_step: int  # of the newest checkpoint


class HeartbeatTable:
    """Each rank's heartbeat (step and tick, every second), in the store of the process group."""

    def __init__(self, context: DistContext, state: HasStep) -> None:
        self.context, self.state = context, state
        self.process = {
            "machine": host_id(),
            "pid": os.getpid(),
            "start": process_start_time(os.getpid()),
        }
        self.stop = threading.Event()
        if context.world_size > 1:
            # Each thread needs its own connection: a read blocks if rank 0, which serves the store,
            # is stopped.
            self.write_store = _get_default_store().clone()
            self.read_store = _get_default_store().clone()
            self.thread = threading.Thread(target=self._write, daemon=True, name="heartbeat")
            self.thread.start()

    def close(self) -> None:
        """Stop writing. A thread inside the store's C++ code would abort the interpreter's exit."""
        self.stop.set()
        if self.context.world_size > 1:
            self.thread.join(CHECK_SECONDS)

    def _write(self) -> None:
        tick = 0
        with suppress(RuntimeError):  # rank 0 has died, so the collectives fail
            while not self.stop.wait(TICK_SECONDS if tick else 0):
                tick += 1
                entry = {**self.process, "tick": tick, "step": self.state.step}
                self.write_store.set(_key(self.context.rank), json.dumps(entry))

    def _read(self) -> dict[int, dict[str, Any]]:
        """Return the last entry of each rank that has written one."""
        entries: dict[int, dict[str, Any]] = {}
        with suppress(RuntimeError):
            for rank in range(self.context.world_size):
                if self.read_store.check([_key(rank)]):
                    entries[rank] = json.loads(self.read_store.get(_key(rank)))
        return entries

    def describe_missing_ranks(self) -> str:
        """Return which ranks have died or do not respond, in words. Takes at most 3 seconds."""
        if self.context.world_size == 1:
            return "there are no other ranks"
        result: list[str] = []
        thread = threading.Thread(target=lambda: result.append(self._describe()), daemon=True)
        thread.start()
        thread.join(CHECK_SECONDS + 1)
        return result[0] if result else "rank 0 does not respond"

    def _describe(self) -> str:
        before = self._read()
        if not before:
            return "rank 0 has died"
        dead = [
            f"rank {rank} has died, last heartbeat after step {entry['step']}"
            for rank, entry in before.items()
            if entry["machine"] == self.process["machine"]
            and process_start_time(entry["pid"]) != entry["start"]
        ]
        if dead:
            return "; ".join(dead)
        time.sleep(CHECK_SECONDS)
        now = self._read()
        silent = [
            f"rank {rank} does not respond, last heartbeat after step {entry['step']}"
            for rank, entry in before.items()
            if now.get(rank, entry)["tick"] == entry["tick"]
        ]
        steps = ", ".join(f"{rank}: {entry['step']}" for rank, entry in sorted(now.items()))
        return "; ".join(silent) or f"all ranks respond, after steps {steps}"


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


@contextmanager
def watchdog(
    context: DistContext, state: HasStep, *, seconds: int, micro_batches: int, folder: Path
) -> Iterator[Callable[[], None]]:
    """End this process after `seconds` without progress, and add rank and step to exceptions.

    A hung rank ends all ranks, since those that wait for it make no progress either. SIGUSR2 prints
    the stack of every thread and changes nothing: `scancel --signal=USR2 JOB`. Yields a function
    that stops the check for progress. `folder` is the run folder, for messages.
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)
    table, over = HeartbeatTable(context, state), threading.Event()
    name = rank_name(context.rank)

    def progress() -> tuple[int, int]:
        return state.step, context.heartbeat.count

    def watch() -> None:
        current, ticks = progress(), 0
        while not over.wait(TICK_SECONDS):
            last, current = current, progress()
            # Ticks instead of a clock, so that suspending the whole job is not a timeout.
            ticks = ticks + 1 if current == last else 0
            if ticks * TICK_SECONDS < seconds - CHECK_SECONDS:
                continue
            missing = table.describe_missing_ranks()
            if progress() != current:
                continue
            print(
                f"error: {name}: no progress for run.timeout_seconds={seconds} since step "
                f"{current[0]}; {missing}. The threads of this rank:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback()
            os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watchdog").start()
    try:
        yield over.set
    except Exception as error:
        over.set()
        if is_out_of_memory(error):
            raise UserError(
                f"out of memory after step {state.step}; use smaller micro-batches: "
                f"run.micro_batches={2 * micro_batches}"
                + (f" name=NEW --fork {folder}" if state.saved_step > 0 else "")
            ) from error
        if "more than 1 value per channel" in str(error):  # BatchNorm's
            raise UserError(
                "a micro-batch is too small: BatchNorm needs at least two rows; lower "
                f"run.micro_batches ({micro_batches}) or raise run.batch_size"
            ) from error
        if isinstance(error, UserError | OSError) and user_message(error):
            raise
        error.add_note(f"Raised on {name}, after step {state.step}.")
        if context.world_size > 1:
            if isinstance(error, RuntimeError):  # of a collective that another rank has left
                error.add_note(f"Other ranks: {table.describe_missing_ranks()}.")
            faulthandler.dump_traceback_later(GRACE_SECONDS, exit=True)
        raise
    finally:
        over.set()
        table.close()
