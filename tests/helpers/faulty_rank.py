"""A real training in which one rank meets a real fault: FAULT="kind:rank:step,..." in the environment."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_dist import train as walk
from cifar_dist.distributed import signals
from cifar_dist.training.graphed_step import StepFn
from cifar_dist.training.state import TrainState
from cifar_dist.utils.errors import run_command
from cifar_dist.utils.files import with_path

FREE = 96 << 20  # bytes that a rank may still ask for, once memory is short


def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """NaN before the first BatchNorm, so that it reaches the running statistics."""
    return output * torch.nan


def meet(kind: str, states: list[TrainState]) -> None:
    match kind:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "asleep":
            time.sleep(1e6)
        case "raising":
            raise KeyError("injected")
        case "disk full":
            with with_path(full := Path("/dev/full")), full.open("wb", buffering=0) as file:
                file.write(b"1")
        case "leaving":
            os._exit(0)
        case "ahead":
            states[0].step += 1
        case "short of memory":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + FREE, used + FREE))


def main(arguments: list[str]) -> int:
    faults = [fault.split(":") for fault in os.environ["FAULT"].split(",")]
    states: list[TrainState] = []
    original_state, original_build = TrainState.__init__, walk.build_step

    def remember(self: TrainState, *values: Any, **options: Any) -> None:
        original_state(self, *values, **options)
        states.append(self)

    def build(accelerator: Any, model: nn.Module, *values: Any, **options: Any) -> StepFn:
        take_step = original_build(accelerator, model, *values, **options)
        return partial(faulty_step, take_step, model, accelerator.process_index)

    def faulty_step(
        take_step: StepFn, model: nn.Module, me: int, micro_batches: Any, *, step: int
    ) -> Any:
        with ExitStack() as stack:
            for kind, rank, when in faults:
                if (int(rank), int(when)) != (me, step):
                    continue
                print(f"FAULT {time.time():.3f}", flush=True)
                if kind == "nan":
                    pixels = model.get_submodule("pixels")
                    stack.callback(pixels.register_forward_hook(spoil).remove)
                else:
                    meet(kind, states)
            return take_step(micro_batches, step=step)

    TrainState.__init__ = remember  # type: ignore[method-assign]
    walk.build_step = build
    return walk.main(arguments)


if __name__ == "__main__":  # under a launcher; ranks.py calls main itself
    signals.install()
    sys.exit(run_command(main))
