"""Train with two ranks; each prints the SHA-256 of its weights at the end."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from cifar_dist import train
from cifar_dist.distributed.launch import destroy_distributed, init_distributed
from cifar_dist.recipe.load import load_recipe
from cifar_dist.training.state import TrainState

if __name__ == "__main__":
    states: list[TrainState] = []
    original_init = TrainState.__init__

    def init(self: TrainState, *arguments: Any, **options: Any) -> None:
        original_init(self, *arguments, **options)
        states.append(self)

    TrainState.__init__ = init  # type: ignore[method-assign]
    accelerator = init_distributed(timeout_seconds=60, threads=1)
    assert accelerator.num_processes == 2
    train.train(load_recipe(Path(sys.argv[1])), accelerator)
    digest = hashlib.sha256()
    for parameter in states[0].model.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    destroy_distributed(accelerator)
    print(digest.hexdigest())
