"""Shards -> one update, as step.py has it, but recorded once on a GPU and replayed: `run.graph`.

At 32 px a step is hundreds of kernels of microseconds each, and to launch them one by one takes longer
than to run them. Replayed, each shard's forward and backward are one launch, the update another. What
the model is shown (augmentation, teacher) comes before, launched while the step before still runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Generic, Literal, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cifar_dist.data.batches import Batch
from cifar_dist.engine.runtime import ReducePrecision, log, reduce_gradients, share_weights, wrap
from cifar_dist.engine.step import (
    Precision,
    Step,
    autocast,
    backward,
    generator_of,
    leading,
    seed_draws,
    train_step,
    update,
)
from cifar_dist.errors import UserError
from cifar_dist.learn.objective import Objective, Shown, Terms
from cifar_dist.learn.optim import keep_scalars_on_device
from cifar_dist.learn.sam import SamConfig

T = TypeVar("T")

WARM_UP = 3  # real steps before a recording: momenta come to be, libraries choose their algorithms
ALIGNMENT = 64  # numbers; gradients begin where vectorised kernels like it
REPLAY_TOLERANCE = 0.1  # relative; cuDNN may choose kernels whose sums are not reproducible


class TakeStep(Protocol):
    """One update with a rank's shards of a global batch."""

    def __call__(self, shards: list[Batch], *, step: int) -> Step: ...


class Recorder:
    """Records device work on one stream into CUDA graphs that share a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run warm-up iterations on the capture stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Return how to replay `work` and where its results will be; nothing is computed yet.

        A RuntimeError leaves the device as it was before; a capture that cannot be ended does not,
        so it is a UserError.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(
                graph,
                pool=self.pool,
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
                    f"run.graph: recording the step failed ({cause}); start again with run.graph=off"
                ) from error
            raise
        return graph.replay, results


class Piece(Generic[T]):
    """Device work on tensors with fixed addresses: eager for WARM_UP calls, then recorded and replayed.

    Without a recorder, and where a recording fails cleanly, it stays eager. It holds no reference to
    the work, so a step and its recordings are freed with the last reference to the step.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self.recorder, self.calls = recorder, 0
        self.replay: Callable[[], None] | None = None
        self.results: T | None = None

    def __call__(self, work: Callable[[], T], written: Callable[[], list[Tensor]]) -> T:
        """Do `work`, always the same one; `written` lists the tensors that it changes in place."""
        self.calls += 1
        if self.recorder is None:
            return work()
        if self.calls <= WARM_UP:
            with self.recorder.beside():
                return work()
        if self.replay is None or self.results is None:
            return self.record(self.recorder, work, written())
        self.replay()
        return self.results

    def record(self, recorder: Recorder, work: Callable[[], T], written: list[Tensor]) -> T:
        """Record the work, and compare a replay with eager execution from the same state.

        UserError where they differ by more than rounding, or at all under run.deterministic.
        """
        generator = generator_of(recorder.device)
        before, random_state = clones(written), generator.get_state()
        with recorder.beside():
            results = work()
        expected = clones([*leaves(results), *written])
        restore(written, before)
        after_random_state = generator.get_state()
        generator.set_state(random_state)
        try:
            replay, recorded = recorder.record(work)
        except RuntimeError as error:
            log.warning(f"run.graph: the step stays eager: recording failed ({first_line(error)})")
            self.recorder = None
            restore(written, expected[len(leaves(results)) :])
            generator.set_state(after_random_state)
            return results
        replay()
        exact = torch.are_deterministic_algorithms_enabled()
        tolerance = 0.0 if exact else REPLAY_TOLERANCE
        found = [*leaves(recorded), *written]
        first = 0 if exact else len(found) - len(written)  # rounding may turn a sample's top-1 over
        difference = relative_difference(found[first:], expected[first:])
        log.debug(f"run.graph: replay and eager step differ by {difference:.3g}")
        if difference > tolerance:
            raise UserError(
                f"run.graph: the recorded step differs from the eager step by {difference:.2g} "
                f"(relative; at most {tolerance:g}); start again with run.graph=off"
            )
        self.replay, self.results = replay, recorded
        return recorded


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def leaves(results: object) -> list[Tensor]:
    """Return the tensors of a piece's results: Terms or one tensor."""
    return list(results.values()) if isinstance(results, dict) else [results]  # type: ignore[list-item]


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


@torch.no_grad()
def restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def relative_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest ||found - expected|| / ||expected|| over the tensors; 0 for equal bits.

    Values that are not finite count as equal to each other: the guard of the step reports them.
    """
    largest = torch.zeros((), dtype=torch.float64, device=found[0].device)
    for one, other in zip(found, expected, strict=True):
        one, other = one.double().nan_to_num(), other.double().nan_to_num()
        difference = (one - other).norm()
        relative = torch.where(difference > 0, difference / other.norm(), 0.0)
        largest = torch.maximum(largest, relative)
    return float(largest)


class CapturedStep:
    """`train_step` for what can be recorded; the same update, bit for bit where kernels are the same.

    Gradients lie in one flat tensor, so that they stay where they are and ranks add theirs up at once;
    DDP has no part in it.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        world_size: int,
        precision: Precision,
        seed: int,
        batch_size: int,
        max_grad_norm: float | None,
        reduce_precision: ReducePrecision,
        recorder: Recorder | None,
    ) -> None:
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.device, self.world_size = device, world_size
        self.precision, self.seed = precision, seed
        self.scale, self.max_grad_norm = world_size / batch_size, max_grad_norm
        self.reduce_precision, self.recorder = reduce_precision, recorder
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        if world_size > 1:
            share_weights(model)
        self.gradients = flat_gradients(model)
        if recorder:
            keep_scalars_on_device(optimizer, device)
        self.baked: object = None  # what a recording holds as plain numbers
        self.shown: dict[int, Shown] = {}  # by place among this rank's shards
        self.pieces: dict[int, Piece[Terms]] = {}
        self.update: Piece[Tensor] = Piece(recorder)

    def __call__(self, shards: list[Batch], *, step: int) -> Step:
        self.forget_what_changed(shards[0].epoch)
        terms = []
        for place, shard in enumerate(shards):
            seed_draws(self.device, seed=self.seed, step=step, shard=shard.shard)
            with autocast(self.precision, self.device):
                self.show(place, self.objective.show(shard))
            seed_draws(self.device, seed=self.seed, step=step, shard=shard.shard)
            piece = self.pieces.setdefault(place, Piece(self.recorder))
            work = partial(self.learn, place, shard.shard)
            terms.append((shard.shard, piece(work, self.written_by_learning)))
        if self.world_size > 1:
            reduce_gradients(self.gradients, self.world_size, precision=self.reduce_precision)
        return Step(terms, self.update(self.updated, self.written_by_update))

    def forget_what_changed(self, epoch: int) -> None:
        """Drop all recordings where an epoch has another image size or other loss weights.

        The next ones get a memory pool of their own: the old pool has the sizes of the old images.
        """
        now = (getattr(self.model, "train_size", None), self.objective.weights(epoch))
        if now != self.baked:
            self.baked = now
            self.pieces.clear()
            if self.recorder:
                self.recorder = Recorder(self.device)
            self.update = Piece(self.recorder)

    def show(self, place: int, shown: Shown) -> None:
        """Put what is shown where the recording of this place reads it."""
        if place not in self.shown:
            self.shown[place] = shown.copy()
        for kept, new in zip(self.shown[place].tensors(), shown.tensors(), strict=True):
            kept.copy_(new)
        self.shown[place] = self.shown[place]._replace(epoch=shown.epoch)

    def learn(self, place: int, shard: int) -> Terms:
        """Forward and backward of the shard at this place; adds to the gradients."""
        if place == 0:
            self.gradients.zero_()
        with leading(self.model, shard == 0), autocast(self.precision, self.device):
            terms = self.objective.judge(self.model, self.shown[place])
        backward(self.scaler, terms["loss"].sum() * self.scale)
        return {name: term.detach() for name, term in terms.items()}

    def written_by_learning(self) -> list[Tensor]:
        return [self.gradients, *self.model.buffers()]

    def updated(self) -> Tensor:
        return update(
            self.model, self.optimizer, self.scaler, times=1, max_grad_norm=self.max_grad_norm
        )

    def written_by_update(self) -> list[Tensor]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        states = [v for state in self.optimizer.state.values() for v in state.values()]
        return [self.gradients, *parameters, *(v for v in states if isinstance(v, Tensor))]


def build_step(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    graph: Literal["auto", "off"],
    shards: int,
    precision: Precision,
    seed: int,
    batch_size: int,
    max_grad_norm: float | None,
    sam: SamConfig | None,
    reduce_precision: ReducePrecision,
    keep_buffers: bool = False,
) -> TakeStep:
    """How to take a step: recorded on a GPU where that can be, else `train_step` under DDP.

    To be built anew when other parameters learn. `keep_buffers`: one that is left out because a
    number was not finite leaves no trace in running statistics.
    """
    keeping = partial(keeping_buffers, model) if keep_buffers else lambda take_step: take_step
    if graph == "auto" and accelerator.device.type == "cuda":
        reason = why_by_hand(model, optimizer, precision=precision, sam=sam)
        if reason is None:
            log.info(f"run.graph: after {WARM_UP} steps the step is recorded, then replayed")
            captured = CapturedStep(
                model,
                objective,
                optimizer,
                device=accelerator.device,
                world_size=accelerator.num_processes,
                precision=precision,
                seed=seed,
                batch_size=batch_size,
                max_grad_norm=max_grad_norm,
                reduce_precision=reduce_precision,
                recorder=Recorder(accelerator.device),
            )
            return keeping(captured)
        log.info(f"run.graph: the step is not recorded: {reason}")
    by_hand = partial(
        train_step,
        accelerator,
        wrap(accelerator, model, shards=shards, reduce_precision=reduce_precision),
        objective,
        optimizer,
        scaler,
        precision=precision,
        seed=seed,
        batch_size=batch_size,
        max_grad_norm=max_grad_norm,
        sam=sam,
    )
    return keeping(by_hand)


def keeping_buffers(model: nn.Module, take_step: TakeStep) -> TakeStep:
    """Puts the model's buffers back where a step was left out, on the device; no number is read."""

    def take(shards: list[Batch], *, step: int) -> Step:
        before = [buffer.clone() for buffer in model.buffers()]
        made = take_step(shards, step=step)
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(torch.where(made.skipped, value, buffer))
        return made

    return take


def flat_gradients(model: nn.Module) -> Tensor:
    """Make the gradient of each parameter that learns a view of one tensor, which is returned.

    Each with its parameter's strides: torch's fused optimizers silently err where they differ.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in learning]
    flat = torch.zeros(sum(sizes), device=learning[0].device)
    for parameter in model.parameters():
        parameter.grad = None
    for parameter, part in zip(learning, flat.split(sizes), strict=True):
        parameter.grad = part.as_strided(parameter.shape, parameter.stride())
    return flat


def why_by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    precision: Precision,
    sam: SamConfig | None,
) -> str | None:
    """Why a step cannot be recorded on a GPU, or None."""
    if precision == "fp16":
        return "the scaler of fp16 reads a number in each step"
    if sam:
        return "optim.sam changes the weights within a step"
    if not optimizer.defaults.get("fused"):
        return f"{type(optimizer).__name__} has no fused form, so a number is read in each step"
    if getattr(model, "second_size", None):
        return "model.second_size draws on the host"
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        return "model.grad_checkpointing keeps the state of generators"
    return None
