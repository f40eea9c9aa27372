"""Record device work as CUDA graphs, check the recording against eager execution, and replay it.

Nothing here knows what a training step is; `graphed_step.py` says what is recorded.
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

WARM_UP = 3  # eager calls before a recording: momenta are allocated, libraries choose algorithms
REPLAY_TOLERANCE = 0.1  # relative; cuDNN may choose kernels whose sums are not reproducible


class GraphRecorder:
    """Records device work on a stream of its own into CUDA graphs.

    Graphs that are replayed one after the other share the memory `pool`.
    """

    def __init__(self, device: torch.device, pool: Any = None) -> None:
        self.device = device
        # Not of the default priority: torch reuses its few streams, so this could be the one on which
        # another thread copies images while a graph is captured.
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.pool = pool or torch.cuda.graph_pool_handle()

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run what is inside on the recorder's stream, after what was before."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """Let what follows wait for the recorder's stream."""
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], T], *, own_pool: bool) -> tuple[Callable[[], None], T]:
        """Return how to replay `work` and where its results will be; nothing is computed yet.

        A RuntimeError leaves the device as it was before; a capture that cannot be ended does not,
        so it is a UserError.
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
            # torch leaves the stream only after it has ended the capture. If that failed, the stream,
            # the generator and the memory pool are still in capture mode and cannot be used again.
            if torch.cuda.current_stream() == self.stream:
                cause = first_line(error.__context__ or error)
                raise UserError(
                    f"run.cuda_graphs: recording the step failed ({cause}); start again with run.cuda_graphs=off"
                ) from error
            raise
        return graph.replay, results


class GraphedCallable(Generic[T]):
    """Device work on tensors with fixed addresses: eager for WARM_UP calls, then recorded and replayed.

    Without a recorder, and where a recording fails cleanly, it stays eager. With `parallel` it is
    replayed on the recorder's stream, and `join` waits for it. It holds no reference to the work, so a
    step and its recordings are freed with the last reference to the step.
    """

    def __init__(self, recorder: GraphRecorder | None, *, parallel: bool = False) -> None:
        self.recorder, self.parallel, self.calls = recorder, parallel, 0
        self.failed = False
        self.replay: Callable[[], None] | None = None
        self.results: Any = None  # of the recording

    def __call__(
        self,
        work: Callable[[], T],
        *,
        written: Callable[[], list[Tensor]] = list,
        compared: Callable[[T], object] = lambda results: results,
    ) -> T:
        """Do `work`, always the same one, and return its results; a replay returns the same tensors.

        `written` lists the tensors that it changes in place. `compared` are those results which a
        replay computes as eager execution does, but for rounding.
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
        """Let what follows wait for a parallel replay."""
        if self.recorder and self.parallel:
            self.recorder.join()

    def record(
        self,
        recorder: GraphRecorder,
        work: Callable[[], T],
        written: list[Tensor],
        compared: Callable[[T], object],
    ) -> T:
        """Record the work, and compare a replay with eager execution from the same state.

        UserError where they differ by more than rounding, or at all under run.deterministic. Work that
        draws random numbers is not replayed in parallel: all graphs read one seed on the device.
        """
        exact = torch.are_deterministic_algorithms_enabled()

        def of(results: T) -> list[Tensor]:
            leaves = tree_leaves(results if exact else compared(results))
            return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        generator = device_generator(recorder.device)
        before, random_state = copies(written), generator.get_state()
        with recorder.on_stream():
            results = work()
        recorder.join()
        expected, after = copies(of(results)), copies(written)
        random_state_after = generator.get_state()
        self.parallel &= torch.equal(random_state, random_state_after)
        restore(written, before)
        generator.set_state(random_state)
        try:
            replay, recorded = recorder.record(work, own_pool=self.parallel)
        except RuntimeError as error:
            log.warning(
                f"run.cuda_graphs: the step stays eager: recording failed ({first_line(error)})"
            )
            self.failed = True
            restore(written, after)
            generator.set_state(random_state_after)
            return results
        replay()
        difference = max(
            relative_difference(of(recorded), expected), relative_difference(written, after)
        )
        log.debug(f"run.cuda_graphs: replay and eager execution differ by {difference:.3g}")
        tolerance = 0.0 if exact else REPLAY_TOLERANCE
        if difference > tolerance:
            raise UserError(
                f"run.cuda_graphs: the recorded step differs from the eager step by {difference:.2g} "
                f"(relative; at most {tolerance:g}); start again with run.cuda_graphs=off"
            )
        self.replay, self.results = replay, recorded
        return recorded


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies of the tensors, on the CPU where a GPU has little room left for them."""
    cuda = bool(tensors) and tensors[0].is_cuda
    free = torch.cuda.mem_get_info(tensors[0].device)[0] if cuda else 0
    if cuda and 4 * sum(tensor.nbytes for tensor in tensors) > free:  # before, after, both compared
        return [tensor.detach().cpu() for tensor in tensors]
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def relative_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return ||found - expected|| / ||expected|| over all tensors together; 0 for equal bits.

    Values that are not finite count as equal to each other: the guard of the step reports them.
    """
    difference = norm = 0.0
    for one, other in zip(found, expected, strict=True):
        one, other = one.to(other.device).double().nan_to_num(), other.double().nan_to_num()
        difference += float((one - other).square().sum())
        norm += float(other.square().sum())
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)
