"""`cifar_dist.train` with gloo instead of NCCL, which refuses two ranks on one GPU."""

from __future__ import annotations

import sys
from functools import partial

from cifar_dist import train
from cifar_dist.distributed import launch, signals
from cifar_dist.utils.errors import run_command

if __name__ == "__main__":
    signals.install()
    launch.InitProcessGroupKwargs = partial(launch.InitProcessGroupKwargs, backend="gloo")
    sys.exit(run_command(train.main))
