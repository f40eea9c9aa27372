"""Emulate the capture of CUDA graphs on the CPU: tape the operations, undo them, and replay them in place.

As on a GPU, capturing computes nothing, results have fixed addresses, and Python numbers and branches are
constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """Record each operation with its arguments and results, and the memory before it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any, bool]] = []
        self.alive: list[Any] = []  # fresh results; a freed address could be given to another
        self.fresh: set[int] = set()
        self.before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = function._schema
        if schema.name in ("aten::_local_scalar_dense", "aten::item"):
            raise RuntimeError(f"a recording cannot read a number: {schema.name}")
        written = []
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                written += tensors_in(value)
        if "batch_norm" in schema.name and "backward" not in schema.name:
            written += tensors_in(args[3:5])  # running statistics; the schema does not say so
        for tensor in written:
            if storage(tensor) not in self.fresh and storage(tensor) not in self.before:
                old = tensor.untyped_storage()
                self.before[storage(tensor)] = (old, old.clone())
        results = function(*args, **kwargs)
        known = {storage(tensor) for tensor in tensors_in((args, kwargs))}
        fresh = [tensor for tensor in tensors_in(results) if storage(tensor) not in known]
        self.alive += fresh
        self.fresh |= {storage(tensor) for tensor in fresh}
        if written or (fresh and "empty" not in schema.name):
            self.operations.append((function, args, kwargs, results, bool(fresh)))
        return results


class EmulatedRecorder:
    """Stands in for `GraphRecorder`; `recordings` counts those of all instances."""

    recordings = 0

    def __init__(self, device: torch.device, pool: Any = None) -> None:
        self.device, self.pool = device, pool

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        yield

    def join(self) -> None:
        pass

    def record(self, work: Callable[[], Any], *, own_pool: bool) -> tuple[Callable[[], None], Any]:
        random_state, tape = torch.get_rng_state(), Tape()
        with tape:
            results = work()
        for memory, old in tape.before.values():
            memory.copy_(old)
        torch.set_rng_state(random_state)
        for tensor in tensors_in(results):  # nothing is computed yet
            tensor.detach().fill_(0 if tensor.dtype == torch.bool else torch.nan)
        EmulatedRecorder.recordings += 1

        @torch.no_grad()
        def replay() -> None:
            with _disable_current_modes():  # what a graph does, no dispatch mode sees
                for function, args, kwargs, old, fresh in tape.operations:
                    new = function(*args, **kwargs)
                    if fresh:
                        for before, now in zip(tree_leaves(old), tree_leaves(new), strict=True):
                            if isinstance(before, Tensor) and before is not now:
                                before.copy_(now)

        return replay, results
