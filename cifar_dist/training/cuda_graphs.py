"""Capture device work as CUDA graphs, compare a replay with eager execution, and replay it.

`graphed_step.py` applies this to the training step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cifar_dist.training.step import device_generator
from cifar_dist.utils.errors import UserError, first_line
from cifar_dist.utils.log import log

T = TypeVar("T")

WARM_UP = 3  # eager calls before the capture: momenta are allocated, libraries choose algorithms
REPLAY_TOLERANCE = 0.1  # relative; cuDNN may choose kernels whose sums are not reproducible


class GraphRecorder:
    """Captures device work on a separate stream.

    Graphs that are replayed one after the other share the memory `pool`.
    """

    def __init__(self, device: torch.device, pool: Any = None) -> None:
        self.device = device
        # Not the default priority: torch reuses its few streams, and another thread may copy images
        # on the same one during a capture.
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.pool = pool or torch.cuda.graph_pool_handle()

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run the context on the capture stream, after all work enqueued before."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """Make later work wait for the capture stream."""
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], T], *, own_pool: bool) -> tuple[Callable[[], None], T]:
        """Capture `work`; return a function that replays it, and its results, not computed yet.

        After a RuntimeError the device is usable. A capture that cannot be ended leaves it unusable
        and raises UserError.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(
                graph,
                pool=torch.cuda.graph_pool_handle() if own_pool else self.pool,
                stream=self.stream,
                capture_error_mode="thread_local",  # other threads write checkpoints, send heartbeats
            ):
                results = work()
        except RuntimeError as error:
            # torch leaves the stream after ending the capture. If ending failed, stream, generator and
            # memory pool are still in capture mode and cannot be used again.
            if torch.cuda.current_stream() == self.stream:
                cause = first_line(error.__context__ or error)
                raise UserError(
                    f"run.cuda_graphs: capturing the step failed ({cause}); restart with run.cuda_graphs=off"
                ) from error
            raise
        return graph.replay, results


class GraphedCallable(Generic[T]):
    """Device work on tensors with fixed addresses: eager for WARM_UP calls, then captured and replayed.

    Stays eager without a recorder and after a capture that failed cleanly. With `parallel` it is
    replayed on the capture stream, and `join` waits for it. It keeps no reference to the work, so a
    step and its graphs are freed together.
    """

    def __init__(self, recorder: GraphRecorder | None, *, parallel: bool = False) -> None:
        self.recorder, self.parallel, self.calls = recorder, parallel, 0
        self.failed = False
        self.replay: Callable[[], None] | None = None
        self.results: Any = None  # of the capture

    def __call__(
        self,
        work: Callable[[], T],
        *,
        written: Callable[[], list[Tensor]] = list,
        compared: Callable[[T], object] = lambda results: results,
    ) -> T:
        """Run `work`, the same in each call, and return its results.

        `written` lists the tensors that it changes in place. `compared` selects the results that a
        replay must reproduce up to rounding.
        """
        self.calls += 1
        if self.recorder is None or self.failed:
            return work()
        if self.calls <= WARM_UP:
            with self.recorder.on_stream():
                results = work()
            self.recorder.join()
            return results
        if self.replay is None:
            return self.record(self.recorder, work, written(), compared)
        if self.parallel:
            with self.recorder.on_stream():
                self.replay()
        else:
            self.replay()
        return self.results

    def join(self) -> None:
        """Make later work wait for a parallel replay."""
        if self.recorder and self.parallel:
            self.recorder.join()

    def record(
        self,
        recorder: GraphRecorder,
        work: Callable[[], T],
        written: list[Tensor],
        compared: Callable[[T], object],
    ) -> T:
        """Capture the work, and compare a replay with eager execution from the same state.

        UserError if they differ by more than rounding, or at all under run.deterministic. Work that
        draws random numbers is not replayed in parallel: all graphs read one seed on the device.
        """
        exact = torch.are_deterministic_algorithms_enabled()

        def selected(results: T) -> list[Tensor]:
            leaves = tree_leaves(results if exact else compared(results))
            return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        generator = device_generator(recorder.device)
        before, random_state = copies(written), generator.get_state()
        with recorder.on_stream():
            results = work()
        recorder.join()
        expected, after = copies(selected(results)), copies(written)
        random_state_after = generator.get_state()
        self.parallel &= torch.equal(random_state, random_state_after)
        restore(written, before)
        generator.set_state(random_state)
        try:
            replay, captured = recorder.record(work, own_pool=self.parallel)
        except RuntimeError as error:
            log.warning(f"CUDA graphs: off, capturing failed ({first_line(error)})")
            self.failed = True
            restore(written, after)
            generator.set_state(random_state_after)
            return results
        replay()
        difference = max(
            relative_difference(selected(captured), expected), relative_difference(written, after)
        )
        log.debug(f"CUDA graphs: replay and eager execution differ by {difference:.3g}")
        tolerance = 0.0 if exact else REPLAY_TOLERANCE
        if difference > tolerance:
            raise UserError(
                f"run.cuda_graphs: the replayed step differs from the eager step by {difference:.2g} "
                f"(relative; at most {tolerance:g}); restart with run.cuda_graphs=off"
            )
        self.replay, self.results = replay, captured
        return captured


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies of the tensors, on the CPU if the GPU has too little memory left."""
    cuda = bool(tensors) and tensors[0].is_cuda
    free = torch.cuda.mem_get_info(tensors[0].device)[0] if cuda else 0
    if (
        cuda and 4 * sum(tensor.nbytes for tensor in tensors) > free
    ):  # four copies are alive at once
        return [tensor.detach().cpu() for tensor in tensors]
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def relative_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return ||actual - expected|| / ||expected|| over all tensors; 0 for equal bits.

    Values that are not finite count as equal: the guard of the step reports them.
    """
    difference = norm = 0.0
    for one, other in zip(actual, expected, strict=True):
        one, other = one.to(other.device).double().nan_to_num(), other.double().nan_to_num()
        difference += float((one - other).square().sum())
        norm += float(other.square().sum())
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)
