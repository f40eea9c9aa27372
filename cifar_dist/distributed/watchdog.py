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

from cifar_dist.distributed.context import Ranks
from cifar_dist.distributed.error_propagation import is_out_of_memory
from cifar_dist.utils.errors import UserError, sentence_of
from cifar_dist.utils.host import machine, process_start

TICK_SECONDS = 1.0
LOOK_SECONDS = 2.0  # a rank that is heard of lets no more than this pass
END_SECONDS = 2  # the longest end of an interpreter whose collectives failed


class HasStep(Protocol):
    step: int  # updates done


class Register:
    """What ranks say of themselves every second, kept where they met at the start (rank 0's host)."""

    def __init__(self, ranks: Ranks, state: HasStep) -> None:
        self.ranks, self.state = ranks, state
        self.me = {"machine": machine(), "pid": os.getpid(), "start": process_start(os.getpid())}
        self.stop = threading.Event()
        if ranks.world_size > 1:
            # A connection of its own for each thread: a rank that is stopped answers nobody.
            self.mine, self.others = _get_default_store().clone(), _get_default_store().clone()
            threading.Thread(target=self._write, daemon=True, name="register").start()

    def _write(self) -> None:
        tick = 0
        with suppress(RuntimeError):  # rank 0 is gone: the others learn it by their collectives
            while not self.stop.wait(TICK_SECONDS if tick else 0):
                tick += 1
                said = {**self.me, "tick": tick, "step": self.state.step}
                self.mine.set(f"register/{self.ranks.rank}", json.dumps(said))

    def _read(self) -> dict[int, dict[str, Any]]:
        """What each rank said last; ranks that never said anything are missing."""
        found: dict[int, dict[str, Any]] = {}
        with suppress(RuntimeError):
            for rank in range(self.ranks.world_size):
                if self.others.check([f"register/{rank}"]):
                    found[rank] = json.loads(self.others.get(f"register/{rank}"))
        return found

    def missing(self) -> str:
        """Which other ranks are gone or silent, in words; looks for at most 3 seconds."""
        if self.ranks.world_size == 1:
            return "it is alone"
        answer: list[str] = []
        thread = threading.Thread(target=lambda: answer.append(self._missing()), daemon=True)
        thread.start()
        thread.join(LOOK_SECONDS + 1)
        return answer[0] if answer else "rank 0 does not answer"

    def _missing(self) -> str:
        before = self._read()
        if not before:
            return "rank 0 is gone"
        gone = [
            f"rank {rank} is gone, last heard of after step {said['step']}"
            for rank, said in before.items()
            if said["machine"] == self.me["machine"] and process_start(said["pid"]) != said["start"]
        ]
        if gone:
            return "; ".join(gone)
        time.sleep(LOOK_SECONDS)
        now = self._read()
        silent = [
            f"rank {rank} does not answer, last heard of after step {said['step']}"
            for rank, said in before.items()
            if now.get(rank, said)["tick"] == said["tick"]
        ]
        steps = ", ".join(f"{rank}: {said['step']}" for rank, said in sorted(now.items()))
        return "; ".join(silent) or f"all ranks answer; steps they have done: {steps}"


@contextmanager
def watched(
    ranks: Ranks, state: HasStep, *, seconds: int, shards: int
) -> Iterator[Callable[[], None]]:
    """End this process when it makes no progress for so long; say rank and step of what goes wrong.

    A rank that waits for another notices no progress either, so a hung rank ends all of them. SIGUSR2
    prints what every thread is doing and changes nothing: `scancel --signal=USR2 JOB`. Gives what
    ends the watch over progress.
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)
    register, over = Register(ranks, state), threading.Event()
    me = f"rank {ranks.rank} ({socket.gethostname()}, process {os.getpid()})"

    def now() -> tuple[int, int]:
        return state.step, ranks.pulse.beats

    def watch() -> None:
        seen, ticks = now(), 0
        while not over.wait(TICK_SECONDS):
            before, seen = seen, now()
            # Ticks, not the clock: a job that was suspended as a whole goes on.
            ticks = ticks + 1 if seen == before else 0
            if ticks * TICK_SECONDS < seconds - LOOK_SECONDS:
                continue
            missing = register.missing()
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
            remedy = f"cut the batch finer: run.shards={2 * shards} --force"
            raise UserError(f"out of memory after step {state.step}; {remedy}") from error
        if "more than 1 value per channel" in str(error):  # BatchNorm's
            raise UserError(
                f"a shard of the batch is too small: BatchNorm needs two rows to compare; lower "
                f"run.shards ({shards}) or raise run.batch_size"
            ) from error
        if isinstance(error, UserError | OSError) and sentence_of(error):
            raise
        error.add_note(f"This is {me}, after step {state.step}.")
        if ranks.world_size > 1:
            if isinstance(error, RuntimeError):  # a collective that another rank has left
                error.add_note(f"The others: {register.missing()}.")
            faulthandler.dump_traceback_later(END_SECONDS, exit=True)
        raise
    finally:
        over.set()
        register.stop.set()
