"""Train with injected faults: the environment variable FAULT is "kind:rank:step,..."."""

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

from cifar_dist import train
from cifar_dist.distributed import signals
from cifar_dist.training import loop
from cifar_dist.training.graphed_step import StepFn
from cifar_dist.training.state import TrainState
from cifar_dist.utils.errors import run_command
from cifar_dist.utils.files import with_path

FREE_BYTES = 96 << 20  # that a rank can still allocate after the fault "short of memory"


def make_nan(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Forward hook before the first BatchNorm, so that NaN reaches the running statistics."""
    return output * torch.nan


def inject(kind: str, state: TrainState) -> None:
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
            state.step += 1
        case "short of memory":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + FREE_BYTES, used + FREE_BYTES))


def main(arguments: list[str]) -> int:
    faults = [fault.split(":") for fault in os.environ["FAULT"].split(",")]
    states: list[TrainState] = []
    original_init, original_build = TrainState.__init__, loop.build_step

    def init(self: TrainState, *values: Any, **options: Any) -> None:
        original_init(self, *values, **options)
        states.append(self)

    def build(accelerator: Any, model: nn.Module, *values: Any, **options: Any) -> StepFn:
        step_fn = original_build(accelerator, model, *values, **options)
        return partial(faulty_step, step_fn, model, accelerator.process_index)

    def faulty_step(
        step_fn: StepFn, model: nn.Module, own_rank: int, micro_batches: Any, *, step: int
    ) -> Any:
        with ExitStack() as stack:
            for kind, rank, at_step in faults:
                if (int(rank), int(at_step)) != (own_rank, step):
                    continue
                print(f"FAULT {time.time():.3f}", flush=True)
                if kind == "nan":
                    hook = model.get_submodule("preprocess").register_forward_hook(make_nan)
                    stack.callback(hook.remove)
                else:
                    inject(kind, states[0])
            return step_fn(micro_batches, step=step)

    TrainState.__init__ = init  # type: ignore[method-assign]
    loop.build_step = build
    return train.main(arguments)


if __name__ == "__main__":  # under a launcher; launcher.py calls main itself
    signals.install()
    sys.exit(run_command(main))
