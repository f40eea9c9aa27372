"""A rank that hangs, dies or fails ends the run within a stated time, and the message names it."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from torch.distributed.distributed_c10d import _get_default_store

from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.error_propagation import is_out_of_memory
from cifar_dist.utils.errors import UserError, user_message
from cifar_dist.utils.host import host_id, process_start_time

TICK_SECONDS = 1.0
CHECK_SECONDS = 2.0  # a rank that is heard of lets no more than this pass
GRACE_SECONDS = 2  # the longest end of an interpreter whose collectives failed


class HasStep(Protocol):
    step: int  # updates done


class HeartbeatTable:
    """What ranks say of themselves every second, kept where they met at the start (rank 0's host)."""

    def __init__(self, context: DistContext, state: HasStep) -> None:
        self.context, self.state = context, state
        self.me = {
            "machine": host_id(),
            "pid": os.getpid(),
            "start": process_start_time(os.getpid()),
        }
        self.stop = threading.Event()
        if context.world_size > 1:
            # A connection of its own for each thread: a rank that is stopped answers nobody.
            self.mine, self.others = _get_default_store().clone(), _get_default_store().clone()
            threading.Thread(target=self._write, daemon=True, name="register").start()

    def _write(self) -> None:
        tick = 0
        with suppress(RuntimeError):  # rank 0 is gone: the others learn it by their collectives
            while not self.stop.wait(TICK_SECONDS if tick else 0):
                tick += 1
                said = {**self.me, "tick": tick, "step": self.state.step}
                self.mine.set(f"register/{self.context.rank}", json.dumps(said))

    def _read(self) -> dict[int, dict[str, Any]]:
        """What each rank said last; ranks that never said anything are missing."""
        found: dict[int, dict[str, Any]] = {}
        with suppress(RuntimeError):
            for rank in range(self.context.world_size):
                if self.others.check([f"register/{rank}"]):
                    found[rank] = json.loads(self.others.get(f"register/{rank}"))
        return found

    def describe_missing_ranks(self) -> str:
        """Which other ranks are gone or silent, in words; looks for at most 3 seconds."""
        if self.context.world_size == 1:
            return "it is alone"
        answer: list[str] = []
        thread = threading.Thread(target=lambda: answer.append(self._missing()), daemon=True)
        thread.start()
        thread.join(CHECK_SECONDS + 1)
        return answer[0] if answer else "rank 0 does not answer"

    def _missing(self) -> str:
        before = self._read()
        if not before:
            return "rank 0 is gone"
        gone = [
            f"rank {rank} is gone, last heard of after step {said['step']}"
            for rank, said in before.items()
            if said["machine"] == self.me["machine"]
            and process_start_time(said["pid"]) != said["start"]
        ]
        if gone:
            return "; ".join(gone)
        time.sleep(CHECK_SECONDS)
        now = self._read()
        silent = [
            f"rank {rank} does not answer, last heard of after step {said['step']}"
            for rank, said in before.items()
            if now.get(rank, said)["tick"] == said["tick"]
        ]
        steps = ", ".join(f"{rank}: {said['step']}" for rank, said in sorted(now.items()))
        return "; ".join(silent) or f"all ranks answer; steps they have done: {steps}"


@contextmanager
def watchdog(
    context: DistContext, state: HasStep, *, seconds: int, micro_batches: int
) -> Iterator[Callable[[], None]]:
    """End this process when it makes no progress for so long; say rank and step of what goes wrong.

    A rank that waits for another notices no progress either, so a hung rank ends all of them. SIGUSR2
    prints what every thread is doing and changes nothing: `scancel --signal=USR2 JOB`. Gives what
    ends the watch over progress.
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)
    register, over = HeartbeatTable(context, state), threading.Event()
    me = f"rank {context.rank} ({socket.gethostname()}, process {os.getpid()})"

    def now() -> tuple[int, int]:
        return state.step, context.heartbeat.count

    def watch() -> None:
        seen, ticks = now(), 0
        while not over.wait(TICK_SECONDS):
            before, seen = seen, now()
            # Ticks, not the clock: a job that was suspended as a whole goes on.
            ticks = ticks + 1 if seen == before else 0
            if ticks * TICK_SECONDS < seconds - CHECK_SECONDS:
                continue
            missing = register.describe_missing_ranks()
            if now() != seen:
                continue
            print(
                f"error: {me}: nothing has happened for run.timeout_seconds={seconds} since step "
                f"{seen[0]}; {missing}. What this rank is doing:",
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
            remedy = f"cut the batch finer: run.micro_batches={2 * micro_batches} --force"
            raise UserError(f"out of memory after step {state.step}; {remedy}") from error
        if "more than 1 value per channel" in str(error):  # BatchNorm's
            raise UserError(
                f"a micro-batch of the batch is too small: BatchNorm needs two rows to compare; lower "
                f"run.micro_batches ({micro_batches}) or raise run.batch_size"
            ) from error
        if isinstance(error, UserError | OSError) and user_message(error):
            raise
        error.add_note(f"This is {me}, after step {state.step}.")
        if context.world_size > 1:
            if isinstance(error, RuntimeError):  # a collective that another rank has left
                error.add_note(f"The others: {register.describe_missing_ranks()}.")
            faulthandler.dump_traceback_later(GRACE_SECONDS, exit=True)
        raise
    finally:
        over.set()
        register.stop.set()
