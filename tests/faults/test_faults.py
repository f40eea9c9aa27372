"""One rank fails, hangs, loses count or runs out of memory: the run ends in time and says which."""

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
from launcher import Ranks, free_port, start_rank, train

from cifar_dist.run_folder.checkpoint import checkpoints
from recipes import RecipeMaker

ENDLESS = {"epochs": 100_000, "eval_every_epochs": 100_000, "log_every_steps": 100_000}
TIMEOUT = 4  # run.timeout_seconds


def faulty(
    path: Path, *faults: str, cwd: Path, world_size: int = 2, arguments: tuple[str, ...] = ()
) -> Ranks:
    """Ranks that meet faults like "killed:1:7": which, on which rank, before which step."""
    return Ranks(
        "faulty_rank",
        [path, *arguments],
        cwd=cwd,
        world_size=world_size,
        environment={"FAULT": ",".join(faults)},
    )


def end(ranks: Ranks, *, who: int) -> float:
    """Wait for rank `who`; seconds from the fault to its end."""
    ranks.processes[who].join(120)
    ended = time.time()
    ranks.kill()
    assert ranks.processes[who].exitcode not in (0, None), ranks.output
    assert "FAULT" in ranks.output, ranks.output
    return ended - float(ranks.output.split("FAULT ")[1].split()[0])


@pytest.mark.parametrize(
    "kind", ["killed", pytest.param("leaving", marks=pytest.mark.fault), "raising"]
)
def test_a_dead_rank_ends_the_others_and_is_named(
    tmp_path: Path, recipe: RecipeMaker, kind: str
) -> None:
    ranks = faulty(recipe(run=ENDLESS), f"{kind}:1:7", cwd=tmp_path)
    assert end(ranks, who=0) < 5
    if kind == "raising":
        assert "process " in ranks.output
        assert "after step 7" in ranks.output
        assert "KeyError: 'injected'" in ranks.output
        assert "This is rank 1" in ranks.output
    else:
        assert "rank 1 is gone, last heard of after step" in ranks.output
    assert checkpoints(tmp_path / "runs/tiny/checkpoints") == []


@pytest.mark.parametrize(
    ("kind", "who"),
    [
        ("stopped", 1),
        pytest.param("stopped", 0, marks=pytest.mark.fault),
        pytest.param("asleep", 0, marks=pytest.mark.fault),
        pytest.param("asleep", 1, marks=pytest.mark.fault),
    ],
)
def test_a_hung_rank_ends_the_others_in_the_recipes_time(
    tmp_path: Path, recipe: RecipeMaker, kind: str, who: int
) -> None:
    path = recipe(run=ENDLESS | {"timeout_seconds": TIMEOUT})
    ranks = faulty(path, f"{kind}:{who}:7", cwd=tmp_path)
    seconds = end(ranks, who=1 - who)
    assert TIMEOUT <= seconds < TIMEOUT + 5, ranks.output
    assert f"nothing has happened for run.timeout_seconds={TIMEOUT}" in ranks.output
    assert "Current thread" in ranks.output  # the stacks of this rank
    if kind == "stopped":
        assert f"rank {who} does not answer" in ranks.output


def test_a_rank_that_lost_count_is_found(tmp_path: Path, recipe: RecipeMaker) -> None:
    ranks = faulty(recipe(run=ENDLESS), "ahead:1:7", cwd=tmp_path)
    assert end(ranks, who=0) < 5
    assert "ranks have lost each other; steps they have done: 0: " in ranks.output


@pytest.mark.parametrize(
    ("who", "world_size"),
    [
        (1, 2),
        pytest.param(0, 2, marks=pytest.mark.fault),
        pytest.param(2, 4, marks=pytest.mark.fault),
    ],
)
def test_what_one_rank_cannot_write_ends_all_in_one_sentence(
    tmp_path: Path, recipe: RecipeMaker, who: int, world_size: int
) -> None:
    """Outside of what ranks do together: a real full device."""
    path = recipe(run=ENDLESS | {"batch_size": 12, "micro_batches": world_size})
    ranks = faulty(path, f"disk full:{who}:7", cwd=tmp_path, world_size=world_size)
    assert ranks.wait(60) == [2] * world_size, ranks.output
    assert time.time() - float(ranks.output.split("FAULT ")[1].split()[0]) < 10
    assert ranks.output.count("error:") == 1, ranks.output
    assert f"error: rank {who} (" in ranks.output
    assert "/dev/full: No space left on device; free or choose another place" in ranks.output
    assert "Traceback" not in ranks.output


@pytest.mark.fault
def test_data_that_only_one_node_sees_damaged_end_all_in_one_sentence(
    tmp_path: Path, recipe: RecipeMaker, data: Path
) -> None:
    """One recipe, one digest, but two places: a local copy on each node."""
    path, port = recipe(data={"path": "data"}, run={"output": str(tmp_path / "runs")}), free_port()
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
def test_out_of_memory_is_one_sentence_of_its_rank(
    tmp_path: Path, recipe: RecipeMaker, world_size: int
) -> None:
    """A real limit: the step's own pictures at 224 px no longer fit."""
    path = recipe(run=ENDLESS | {"batch_size": 60}, model={"image_size": 256})
    last = world_size - 1
    ranks = faulty(path, f"short of memory:{last}:2", cwd=tmp_path, world_size=world_size)
    assert end(ranks, who=0) < 15
    remedy = "out of memory after step 2; cut the batch finer: run.micro_batches=4 --force"
    assert ranks.output.count(remedy) == ranks.output.count("error:") == 1
    assert world_size == 1 or f"error: rank {last} (" in ranks.output
    assert ranks.processes[last].exitcode == 2


def test_out_of_memory_before_the_first_step_is_one_sentence(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    """A real limit, met as the model is made."""
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


def test_a_loss_that_is_not_finite_stops_all_ranks_and_is_named(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    ranks = faulty(recipe(), "nan:1:12", cwd=tmp_path)
    assert ranks.wait() == [2, 2], ranks.output
    assert ranks.output.count("error:") == 1
    assert "step 13: not finite: cross_entropy on rank 1;" in ranks.output
    assert "run.on_nonfinite=skip" in ranks.output
    assert checkpoints(tmp_path / "runs/tiny/checkpoints") == []
    assert not (tmp_path / "runs/tiny/summary.json").exists()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.fault)])
def test_a_step_that_is_not_finite_is_left_out_everywhere(
    tmp_path: Path, recipe: RecipeMaker, precision: str
) -> None:
    """Rank 0's NaN reaches the running statistics of micro-batch 0, which are the run's."""
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
        assert "1 step(s) left out since the last report" in ranks.output
        found = tensors(tmp_path / f"runs/w{world_size}")
        assert all(torch.isfinite(value.double()).all() for value in found.values())
    train(skip, "name=sound", cwd=tmp_path)
    sound, spoilt = lines(tmp_path / "runs/sound"), lines(tmp_path / "runs/w2")
    assert [line["step"] for line in spoilt] == [line["step"] for line in sound]
    assert spoilt[:3] == sound[:3]  # up to step 10
    assert [line["skipped"] for line in spoilt if line["kind"] == "train"] == [0, 0, 1, 0, 0]
    assert all(line["loss"] is not None for line in spoilt)
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w2")
