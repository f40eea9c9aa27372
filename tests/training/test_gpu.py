"""Tests that need a GPU. `make gpu-check` runs each of them in a separate process.

Accelerate's state is a singleton and a failed capture leaves the device unusable, so no two tests share a
process. Runs are compared under `run.deterministic`, to equal bits.
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from compare import assert_same_bits
from launcher import free_port
from step_cost import ALL_OPS, Waits, batches_of, model_of
from streams import augment_steps, plan
from torch import Tensor, nn

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.data.streaming import stream_images
from cifar_dist.distributed.local_launch import rank_environment
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.optim.optimizer import OptimConfig, build_optimizer, set_learning_rate
from cifar_dist.run_folder.checkpoint import checkpoints
from cifar_dist.training.cuda_graphs import WARM_UP, GraphRecorder
from cifar_dist.training.graphed_step import GraphedStep, StepFn, build_step
from cifar_dist.training.objective import Objective
from cifar_dist.training.step import StepConfig
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.precision import Precision, make_scaler
from recipes import RecipeMaker, TeacherMaker, with_teachers

pytestmark = pytest.mark.gpu

MIXED = AugmentConfig(crop_padding=4, hflip=True, mixup=0.2, cutmix=1.0)
STEPS_PER_EPOCH = 3  # 64 rows in batches of 20


@pytest.fixture
def accelerator() -> Accelerator:
    accelerator = Accelerator()
    assert accelerator.device.type == "cuda", "a test before this one in the process used the CPU"
    return accelerator


@pytest.fixture
def deterministic() -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step_of(
    accelerator: Accelerator,
    model: nn.Module,
    split: Split,
    optimizer: torch.optim.Optimizer,
    *,
    cuda_graphs: Any,
    precision: Precision,
    augment: AugmentConfig = MIXED,
) -> StepFn:
    return build_step(
        accelerator,
        model,
        Objective(Augment(augment, split), {"cross_entropy": CrossEntropy()}),
        optimizer,
        make_scaler(precision, accelerator.device),
        StepConfig(precision=precision, seed=0, batch_size=20, max_grad_norm=1.0),
        cuda_graphs=cuda_graphs,
        micro_batches=2,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd"])
def test_graphed_step_matches_eager_step(
    data: Path,
    accelerator: Accelerator,
    deterministic: None,
    optimizer_name: str,
    precision: Precision,
) -> None:
    """Ten steps with dropout, mixing and a changing learning rate, over three epochs."""
    split = load_split(data, "train", accelerator.device)
    initial = model_of(CrossEntropy()).to(accelerator.device).to(memory_format=torch.channels_last)
    results: dict[str, Tensor] = {}
    for cuda_graphs in ("off", "on"):
        model = copy.deepcopy(initial)
        optimizer = build_optimizer(OptimConfig(name=optimizer_name), model)
        take_step = step_of(
            accelerator, model, split, optimizer, cuda_graphs=cuda_graphs, precision=precision
        )
        batches = batches_of(split)
        for step in range(10):
            set_learning_rate(optimizer, 0.01 / (1 + step))
            with Waits() as waits:
                result = take_step(next(batches), step=step)
            if step % STEPS_PER_EPOCH and step != WARM_UP:  # the recording compares with eager
                assert waits.count == 0, f"{cuda_graphs}, step {step}"
        assert not result.skipped
        if cuda_graphs == "on":
            assert isinstance(take_step, GraphedStep)
            assert take_step.update_graph.replay is not None
            assert [one.parallel for one in take_step.learning_graphs] == [False] * 2, (
                "dropout draws"
            )
        results[cuda_graphs] = torch.cat([t.detach().double().flatten() for t in tensors_of(model)])
    assert torch.equal(results["on"], results["off"])


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("cuda_graphs", ["off", "on"])
def test_step_never_waits_for_the_device(
    data: Path, accelerator: Accelerator, cuda_graphs: str
) -> None:
    split = load_split(data, "train", accelerator.device)
    model = model_of(CrossEntropy()).to(accelerator.device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(OptimConfig(name="adamw"), model)
    take_step = step_of(
        accelerator,
        model,
        split,
        optimizer,
        cuda_graphs=cuda_graphs,
        precision="bf16",
        augment=ALL_OPS,
    )
    batches = batches_of(split)
    for step in range(2 * STEPS_PER_EPOCH + 1):
        take_step(next(batches), step=step)
    with waiting_is_an_error():
        for step in (7, 8):  # the rest of the third epoch
            set_learning_rate(optimizer, 0.01 / step)
            take_step(next(batches), step=step)


def test_capture_with_a_host_read_is_a_user_error(accelerator: Accelerator) -> None:
    """A capture invalidated by a host read cannot be ended, and nothing may run after it."""
    recorder = GraphRecorder(accelerator.device)
    numbers = torch.ones(3, device=accelerator.device)

    with pytest.raises(UserError, match=r"capturing the step failed \(.*run\.cuda_graphs=off"):
        recorder.record(lambda: numbers.sum().item(), own_pool=False)


def test_device_is_usable_after_a_failed_capture(accelerator: Accelerator) -> None:
    recorder = GraphRecorder(accelerator.device)
    numbers = torch.ones(3, device=accelerator.device)

    def work() -> Tensor:
        raise RuntimeError("not on this device")

    with pytest.raises(RuntimeError, match="not on this device"):
        recorder.record(work, own_pool=False)
    assert float(numbers.sum()) == 3
    replay, total = recorder.record(lambda: numbers.sum(), own_pool=True)
    replay()
    assert float(total) == 3


def test_images_on_the_host_arrive_without_a_wait(data: Path) -> None:
    device = torch.device("cuda", 0)
    split = load_split(data, "train", device)
    on_host = load_split(data, "train", device, "host")
    assert not on_host.images.is_cuda
    plan_from_start = partial(plan, start_step=0)
    rows = torch.arange(5, 64)
    expected = augment_steps(Augment(ALL_OPS, split, rows), plan_from_start(split))
    with stream_images(ALL_OPS, on_host, rows, plan_from_start) as source:
        batches = plan_from_start(on_host)
        augment = Augment(ALL_OPS, on_host, rows, image_source=source)
        actual = augment_steps(augment, batches, steps=1)
        with waiting_is_an_error():
            actual += augment_steps(augment, batches, steps=4)  # the rest of the epoch
        actual += augment_steps(augment, batches, steps=7)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.images, other.images)


# ----------------------------------------------------------------------------- whole runs


MODULE = ("-m", "cifar_dist.train")
GLOO = (str(Path(__file__).parents[1] / "helpers/gloo_on_gpu.py"),)


def start(
    recipe: Path,
    *overrides: str,
    cwd: Path,
    program: tuple[str, ...] = MODULE,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *program, str(recipe), "run.deterministic=true", *overrides],
        cwd=cwd,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_ranks(
    recipe: Path, *overrides: str, cwd: Path, world_size: int = 2
) -> list[subprocess.Popen[str]]:
    """Start ranks that share the GPU; a local rank of 0 is what a Slurm task with one GPU has."""
    port = free_port()
    return [
        start(
            recipe,
            *overrides,
            cwd=cwd,
            program=GLOO,
            environment=rank_environment(rank, world_size, port) | {"LOCAL_RANK": "0"},
        )
        for rank in range(world_size)
    ]


def finish(process: subprocess.Popen[str], *, code: int = 0) -> str:
    output, _ = process.communicate(timeout=150)
    assert process.returncode == code, output
    return output


SMALL_RUNS: dict[str, dict[str, Any]] = {
    "adamw, mixing, dropout, an average, three micro-batches": {"run": {"micro_batches": 3}},
    "sgd in bf16 with growing images": {
        "run": {"precision": "bf16"},
        "model": {"image_size": 64, "progressive_resize": {"start": 32, "epochs": 2}},
        "optim": {"name": "sgd", "lr": 0.01},
    },
    "four micro-batches in parallel, nothing random": {
        "run": {"micro_batches": 4, "precision": "bf16"},
        "model": {"drop_rate": 0.0},
        "optim": {"name": "sgd", "lr": 0.01},
    },
    "layers that thaw": {"model": {"freeze": [{"pattern": "backbone.*", "until_epoch": 2}]}},
}


@pytest.mark.parametrize("sections", SMALL_RUNS.values(), ids=SMALL_RUNS)
def test_graphed_run_matches_eager_run(
    tmp_path: Path, recipe: RecipeMaker, sections: dict[str, Any]
) -> None:
    path = recipe(**sections)
    runs = [
        start(path, f"name={name}", f"run.cuda_graphs={name}", cwd=tmp_path)
        for name in ("auto", "off")
    ]
    outputs = [finish(process) for process in runs]
    assert "CUDA graphs: capturing the step" in outputs[0]
    assert "CUDA graphs" not in outputs[1]
    assert_same_bits(tmp_path / "runs/auto", tmp_path / "runs/off")


def test_graphed_run_with_teacher_matches_eager_run(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    teacher("big", image_size=48)
    path = recipe(**with_teachers("big"))
    for process in [
        start(path, f"name={name}", f"run.cuda_graphs={name}", cwd=tmp_path)
        for name in ("auto", "off")
    ]:
        finish(process)
    assert_same_bits(tmp_path / "runs/auto", tmp_path / "runs/off")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resume_matches_uninterrupted_run(
    tmp_path: Path, recipe: RecipeMaker, precision: str
) -> None:
    """SIGTERM in the middle of an epoch, with graphs before and after; fp16 stays eager."""
    path = recipe(run={"epochs": 100, "precision": precision})
    straight = start(path, "name=straight", cwd=tmp_path)
    stopped = start(path, "name=stopped", "run.save_every_minutes=1e-9", cwd=tmp_path)
    folder = tmp_path / "runs/stopped/checkpoints"
    deadline = time.monotonic() + 100
    while not any(int(actual.name.removeprefix("step_")) > 40 for actual in checkpoints(folder)):
        assert stopped.poll() is None, finish(stopped)
        assert time.monotonic() < deadline, "no checkpoint of step 41 or later"
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    finish(stopped, code=75)
    output = finish(start(path, "name=stopped", cwd=tmp_path))
    assert "resuming from step" in output
    finish(straight)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/stopped")


def test_one_rank_under_nccl_matches_plain_process(tmp_path: Path, recipe: RecipeMaker) -> None:
    """As `torchrun --nproc_per_node 1` and a Slurm task start it; auto is bf16."""
    path = recipe(run={"precision": "auto"})
    plain = start(path, "name=plain", cwd=tmp_path)
    nccl = start(path, "name=nccl", cwd=tmp_path, environment=rank_environment(0, 1, free_port()))
    finish(plain)
    finish(nccl)
    assert "precision: bf16" in (tmp_path / "runs/nccl/recipe.yaml").read_text()
    assert_same_bits(tmp_path / "runs/nccl", tmp_path / "runs/plain")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_two_ranks_match_one(tmp_path: Path, recipe: RecipeMaker, precision: str) -> None:
    path = recipe(run={"precision": precision})
    one = start(path, "name=w1", cwd=tmp_path)
    graphed = start_ranks(path, "name=w2", cwd=tmp_path)
    eager = start_ranks(path, "name=w2_eager", "run.cuda_graphs=off", cwd=tmp_path)
    outputs = [finish(process) for process in (one, *graphed, *eager)]
    assert "2 process(es) on cuda" in outputs[1]
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w2")
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w2_eager")


def test_sharded_teacher_matches_whole_teacher(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    teacher("big", image_size=48)
    path = recipe(**with_teachers("big", placement="sharded"))
    one, *two = [start(path, "name=w1", cwd=tmp_path), *start_ranks(path, "name=w2", cwd=tmp_path)]
    outputs = [finish(process) for process in (one, *two)]
    assert "2 process(es) on cuda" in outputs[1]
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w2")


def test_fork_with_graphs_matches_eager_fork(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run={"epochs": 2})
    finish(start(path, cwd=tmp_path))
    forks = [
        start(
            path,
            *(f"name={name}", f"run.cuda_graphs={name}", "--fork", "runs/tiny"),
            *("run.epochs=4", "optim.lr=0.001"),
            cwd=tmp_path,
        )
        for name in ("auto", "off")
    ]
    for process in forks:
        assert "runs/tiny" in finish(process)
    assert_same_bits(tmp_path / "runs/auto", tmp_path / "runs/off")


EAGER: dict[str, tuple[dict[str, Any], str]] = {
    "sam": ({"optim": {"name": "sgd", "lr": 0.01, "sam": {"rho": 0.05}}}, "optim.sam"),
    "muon": ({"optim": {"name": "muon", "lr": 0.01}}, "not fused"),
    "mixed resolution": (
        {"model": {"mixed_resolution": 48}},
        "model.mixed_resolution",
    ),
    "checkpointing": (
        {"model": {"backbone": "test_vit", "grad_checkpointing": True}},
        "model.grad_checkpointing",
    ),
}


@pytest.mark.parametrize(("sections", "reason"), EAGER.values(), ids=EAGER)
def test_step_that_cannot_be_captured_is_eager_and_reproducible(
    tmp_path: Path, recipe: RecipeMaker, sections: dict[str, Any], reason: str
) -> None:
    path = recipe(run={"precision": "bf16", "epochs": 2}, **sections)
    runs = [start(path, f"name={name}", cwd=tmp_path) for name in ("one", "two")]
    for process in runs:
        output = finish(process)
        assert "CUDA graphs: off" in output
        assert reason in output
    assert_same_bits(tmp_path / "runs/one", tmp_path / "runs/two")


def test_commands_read_runs_of_the_gpu(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run={"precision": "bf16"})

    def command(*words: str) -> str:
        return finish(
            subprocess.Popen(
                [sys.executable, "-m", f"cifar_dist.{words[0]}", *words[1:]],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )

    finish(start(path, "name=one", cwd=tmp_path))
    output = command("cli", "train", str(path), "name=two", "run.seed=1", "--processes", "auto")
    assert "1 process(es) on cuda" in output
    assert "logits" in command("evaluate", "runs/one")
    command("predict", "runs/one", "--rows", "test:0-9", "--json", "best.json")
    command("ensemble", "runs/one", "runs/two")
    command("report", "runs/one", "runs/two")
    assert (tmp_path / "best.json").exists()
