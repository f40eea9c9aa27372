"""One rank dies, hangs, desynchronizes or runs out of memory: the run ends in time and names it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits, lines, tensors
from launcher import Launch, free_port, start_rank, train

from cifar_dist.run_folder.checkpoint import checkpoints
from recipes import RecipeMaker

ROOT = Path(__file__).parents[2]

ENDLESS = {"epochs": 100_000, "eval_every_epochs": 100_000, "log_every_steps": 100_000}
TIMEOUT = 4  # run.timeout_seconds


def faulty(
    path: Path, *faults: str, cwd: Path, world_size: int = 2, arguments: tuple[str, ...] = ()
) -> Launch:
    """Start ranks with faults "kind:rank:step", such as "killed:1:7" (see faulty_rank.py)."""
    return Launch(
        "faulty_rank",
        [path, *arguments],
        cwd=cwd,
        world_size=world_size,
        environment={"FAULT": ",".join(faults)},
    )


def fault_time(ranks: Launch) -> float:
    assert "FAULT" in ranks.output, ranks.output
    return float(ranks.output.split("FAULT ")[1].split()[0])


def wait_for_end(ranks: Launch, rank: int) -> float:
    """Wait until `rank` fails, and return the seconds since the fault."""
    ranks.processes[rank].join(120)
    end = time.time()
    ranks.kill()
    assert ranks.processes[rank].exitcode not in (0, None), ranks.output
    return end - fault_time(ranks)


@pytest.mark.parametrize(
    "kind", ["killed", pytest.param("leaving", marks=pytest.mark.fault), "raising"]
)
def test_dead_rank_is_named_and_ends_the_others(
    tmp_path: Path, recipe: RecipeMaker, kind: str
) -> None:
    ranks = faulty(recipe(run=ENDLESS), f"{kind}:1:7", cwd=tmp_path)
    assert wait_for_end(ranks, 0) < 5
    if kind == "raising":
        assert "process " in ranks.output
        assert "after step 7" in ranks.output
        assert "KeyError: 'injected'" in ranks.output
        assert "Raised on rank 1" in ranks.output
    else:
        assert "rank 1 has died, last heartbeat after step" in ranks.output
    assert checkpoints(tmp_path / "runs/tiny/checkpoints") == []


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("stopped", 1),
        pytest.param("stopped", 0, marks=pytest.mark.fault),
        pytest.param("asleep", 0, marks=pytest.mark.fault),
        pytest.param("asleep", 1, marks=pytest.mark.fault),
    ],
)
def test_hung_rank_ends_the_others_after_the_timeout(
    tmp_path: Path, recipe: RecipeMaker, kind: str, rank: int
) -> None:
    path = recipe(run=ENDLESS | {"timeout_seconds": TIMEOUT})
    ranks = faulty(path, f"{kind}:{rank}:7", cwd=tmp_path)
    seconds = wait_for_end(ranks, 1 - rank)
    assert TIMEOUT <= seconds < TIMEOUT + 5, ranks.output
    assert f"no progress for run.timeout_seconds={TIMEOUT}" in ranks.output
    assert "Current thread" in ranks.output  # the stack traces of this rank
    if kind == "stopped":
        assert f"rank {rank} does not respond" in ranks.output


def test_desynchronized_rank_is_detected(tmp_path: Path, recipe: RecipeMaker) -> None:
    ranks = faulty(recipe(run=ENDLESS), "ahead:1:7", cwd=tmp_path)
    assert wait_for_end(ranks, 0) < 5
    assert "ranks are at different steps (rank: step): 0: " in ranks.output


@pytest.mark.parametrize(
    ("rank", "world_size"),
    [
        (1, 2),
        pytest.param(0, 2, marks=pytest.mark.fault),
        pytest.param(2, 4, marks=pytest.mark.fault),
    ],
)
def test_write_error_on_one_rank_ends_all_with_one_sentence(
    tmp_path: Path, recipe: RecipeMaker, rank: int, world_size: int
) -> None:
    """A write to /dev/full outside of a collective."""
    path = recipe(run=ENDLESS | {"batch_size": 12, "micro_batches": world_size})
    ranks = faulty(path, f"disk full:{rank}:7", cwd=tmp_path, world_size=world_size)
    assert ranks.wait(60) == [2] * world_size, ranks.output
    assert time.time() - fault_time(ranks) < 10
    assert ranks.output.count("error:") == 1, ranks.output
    assert f"error: rank {rank} (" in ranks.output
    assert "/dev/full: No space left on device; free space or choose another path" in ranks.output
    assert "Traceback" not in ranks.output


@pytest.mark.fault
def test_data_damaged_on_one_node_ends_all_with_one_sentence(
    tmp_path: Path, recipe: RecipeMaker, data: Path
) -> None:
    """Each node has a local copy of the data, and one copy is damaged."""
    path = recipe(data={"path": "data"}, run={"output_dir": str(tmp_path / "runs")})
    port = free_port()
    processes = []
    for rank in range(2):
        node = tmp_path / f"node{rank}"
        shutil.copytree(data, node / "data")
        if rank == 1:
            table = node / "data/train/data-00000-of-00001.arrow"
            content = bytearray(table.read_bytes())
            content[len(content) // 2] ^= 1
            table.write_bytes(content)
        command = ["-m", "cifar_dist.train", path]
        processes.append(start_rank(command, cwd=node, rank=rank, world_size=2, port=port))
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    assert errors[0] == ""
    assert errors[1].startswith("error: rank 1 (")
    assert errors[1].count("\n") == 1
    assert "cifar_dist.prepare --force" in errors[1]


@pytest.mark.parametrize("world_size", [2, pytest.param(1, marks=pytest.mark.fault)])
def test_out_of_memory_is_one_sentence_of_that_rank(
    tmp_path: Path, recipe: RecipeMaker, world_size: int
) -> None:
    """A real memory limit, which the images of a step at 256 px exceed."""
    path = recipe(run=ENDLESS | {"batch_size": 60}, model={"image_size": 256})
    last = world_size - 1
    ranks = faulty(path, f"short of memory:{last}:2", cwd=tmp_path, world_size=world_size)
    assert wait_for_end(ranks, 0) < 15
    message = "out of memory after step 2; use smaller micro-batches: run.micro_batches=4"
    assert ranks.output.count(message) == ranks.output.count("error:") == 1
    assert world_size == 1 or f"error: rank {last} (" in ranks.output
    assert ranks.processes[last].exitcode == 2


def test_out_of_memory_before_the_first_step_is_one_sentence(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    """A real memory limit, which building the model exceeds."""
    path = recipe(model={"backbone": "vit_giant_patch14_clip_224", "image_size": 224})
    command = f"ulimit -v 5000000; exec {sys.executable} -m cifar_dist.train {path}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "error: out of memory (" in done.stderr
    assert "Traceback" not in done.stderr


def test_nonfinite_loss_stops_all_ranks_and_is_named(tmp_path: Path, recipe: RecipeMaker) -> None:
    ranks = faulty(recipe(), "nan:1:12", cwd=tmp_path)
    assert ranks.wait() == [2, 2], ranks.output
    assert ranks.output.count("error:") == 1
    assert "step 13: not finite: cross_entropy on rank 1;" in ranks.output
    assert "run.on_nonfinite=skip" in ranks.output
    assert checkpoints(tmp_path / "runs/tiny/checkpoints") == []
    assert not (tmp_path / "runs/tiny/summary.json").exists()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.fault)])
def test_nonfinite_step_is_skipped_on_all_ranks(
    tmp_path: Path, recipe: RecipeMaker, precision: str
) -> None:
    """The NaN reaches the BatchNorm statistics of micro-batch 0, which the run uses."""
    skip = recipe(run={"on_nonfinite": "skip", "precision": precision})
    for world_size in (1, 2):
        ranks = faulty(
            skip,
            "nan:0:12",
            cwd=tmp_path,
            world_size=world_size,
            arguments=(f"name=w{world_size}",),
        )
        assert ranks.wait() == [0] * world_size, ranks.output
        assert "step 13: not finite: cross_entropy on rank 0" in ranks.output
        assert "; skipped 1 step(s)" in ranks.output
        saved = tensors(tmp_path / f"runs/w{world_size}")
        assert all(torch.isfinite(value.double()).all() for value in saved.values())
    train(skip, "name=clean", cwd=tmp_path)
    clean, skipped = lines(tmp_path / "runs/clean"), lines(tmp_path / "runs/w2")
    assert [line["step"] for line in skipped] == [line["step"] for line in clean]
    assert skipped[:3] == clean[:3]  # up to step 10
    assert [line["skipped"] for line in skipped if line["kind"] == "train"] == [0, 0, 1, 0, 0]
    assert all(line["loss"] is not None for line in skipped)
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w2")


def test_no_thread_is_in_the_store_when_the_interpreter_exits() -> None:
    """Such a thread ends in `terminate called without an active exception`."""
    script = """
import threading
from types import SimpleNamespace
from pathlib import Path
import torch.distributed as dist
from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.error_propagation import ErrorChannel
from cifar_dist.distributed.watchdog import watchdog
store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
channel, context = ErrorChannel(0, 2), DistContext(0, 2, None)
state = SimpleNamespace(step=0, saved_step=0)
with watchdog(context, state, seconds=600, micro_batches=1, folder=Path("a")) as stop:
    print(sorted(thread.name for thread in threading.enumerate()))
    stop()
channel.close()
print(sorted(thread.name for thread in threading.enumerate() if thread.name != "watchdog"))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    during, after = result.stdout.splitlines()
    assert during == "['MainThread', 'errors', 'heartbeat', 'watchdog']"
    assert after == "['MainThread']"
