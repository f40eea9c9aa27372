"""One rank of a test that compares sharded with replicated teachers; writes rank_N.json."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from cifar_dist.distill.teacher import TeacherConfig, eval_frozen, load_sharded
from cifar_dist.distributed.context import rank_mesh
from cifar_dist.distributed.launch import destroy_distributed, init_distributed
from cifar_dist.models.classifier import build_model
from cifar_dist.recipe.teachers import find_teacher


def main(arguments: list[str]) -> int:
    accelerator = init_distributed(timeout_seconds=60, threads=1)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    over, *folders = arguments
    mesh = rank_mesh(accelerator.device, world_size, over="node" if over == "node" else "world")
    assert mesh is not None
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    results = {}
    for folder in folders:
        trained = find_teacher(TeacherConfig(run=folder))
        replicated = eval_frozen(build_model(trained.model, 100, load_file(trained.weights)))
        sharded = load_sharded(trained, 100, mesh)
        equal = []
        for bf16 in (False, True):
            for _ in range(2):  # again after all blocks were gathered and freed
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    equal.append(torch.equal(replicated(images).logits, sharded(images).logits))
        names = Counter(p for _, p in replicated.named_parameters(remove_duplicate=False))
        tied = {name for name, p in replicated.named_parameters() if names[p] > 1}  # on all ranks
        shapes = {}
        for name, parameter in sharded.named_parameters():
            if name in tied:
                continue
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            storage = local.untyped_storage().nbytes() // local.element_size()
            shapes[name] = [list(parameter.shape), list(local.shape), storage]
        results[folder] = {"world_size": world_size, "equal": equal, "shapes": shapes}
    Path(f"rank_{rank}.json").write_text(json.dumps(results))
    destroy_distributed(accelerator)
    return 0
