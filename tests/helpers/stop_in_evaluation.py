"""Train, and send SIGTERM to rank 0 in the middle of an evaluation: STOP_IN is its number, from 1.

A refresh of BatchNorm statistics counts as an evaluation.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

from cifar_dist import train
from cifar_dist.data.batches import Batch
from cifar_dist.evaluation import evaluator


def main(arguments: list[str]) -> int:
    original, numbers = evaluator.eval_blocks, itertools.count(1)

    def eval_blocks(*values: Any, rank: int, **options: Any) -> Iterator[Batch]:
        number = next(numbers)
        for block in original(*values, rank=rank, **options):
            if rank == 0 and number == int(os.environ["STOP_IN"]):
                os.kill(os.getpid(), signal.SIGTERM)
            yield block

    evaluator.eval_blocks = eval_blocks
    return train.main(arguments)
