"""The launch check says yes where training can begin, and what is in the way where it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import Ranks, free_port, start_rank

import cifar_dist.doctor as command
from cifar_dist.distributed.context import DistContext as Group
from recipes import RecipeMaker


def doctor(*arguments: object, cwd: Path, world_size: int = 2) -> tuple[int | None, dict[str, str]]:
    """The exit code that all ranks share, and the table: what -> mark and text."""
    ranks = Ranks("doctor", arguments, cwd=cwd, world_size=world_size)
    codes = set(ranks.wait())
    assert len(codes) == 1, ranks.output
    table = [line for line in ranks.output.splitlines() if line[:3] in ("ok ", "BAD", "   ")]
    return codes.pop(), {line[5:16].strip(): line for line in table}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_launch_that_can_begin(tmp_path: Path, recipe: RecipeMaker, world_size: int) -> None:
    code, table = doctor(recipe(), cwd=tmp_path, world_size=world_size)
    assert code == 0, table
    assert f"{world_size} x cpu" in table["devices"]
    assert f"2 micro-batches of 10 rows on {world_size} processes" in table["micro_batches"]
    assert all(line.startswith("ok ") for what, line in table.items() if what in "code data recipe")
    assert ("all-reduce" in table) == (world_size == 2)
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_is_in_the_way_is_named(tmp_path: Path, recipe: RecipeMaker) -> None:
    code, table = doctor(recipe(data={"path": "nowhere"}, run={"micro_batches": 1}), cwd=tmp_path)
    assert code == 2
    assert table["data"].startswith("BAD")
    assert table["micro_batches"].startswith("BAD")
    assert "start at most 1" in table["micro_batches"]


@pytest.mark.parametrize("harm", ["digest alone", "too few rows", "a file in the way"])
def test_bad_data_and_a_bad_place_are_lines_of_the_table(
    tmp_path: Path, recipe: RecipeMaker, data: Path, harm: str
) -> None:
    keys: dict[str, dict[str, object]] = {}
    match harm:
        case "digest alone":
            (tmp_path / "data").mkdir()
            shutil.copy(data / "digest.json", tmp_path / "data")
            keys, line, says = {"data": {"path": "data"}}, "data", "is missing"
        case "too few rows":
            keys, line, says = {"run": {"batch_size": 100_000}}, "data", "is more than the"
        case _:
            (tmp_path / "runs").touch()
            line, says = "run.output_dir", "choose another place"
    code, table = doctor(recipe(**keys), cwd=tmp_path)
    assert code == 2
    assert table[line].startswith("BAD")
    assert says in table[line]
    assert table["micro_batches"].startswith("ok ")


def test_ranks_with_other_recipes_and_other_folders(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Two machines without a shared folder: each rank has a run.output_dir of its own."""
    port, path = free_port(), recipe()
    processes = []
    for rank in range(2):
        cwd = tmp_path / f"machine{rank}"
        cwd.mkdir()
        shutil.copy(path, cwd / "recipe.yaml")
        command = ["-m", "cifar_dist.doctor", "recipe.yaml", f"run.seed={rank}"]
        processes.append(start_rank(command, cwd=cwd, rank=rank, world_size=2, port=port))
    output, _ = processes[0].communicate(timeout=120)
    processes[1].communicate(timeout=120)
    assert [process.returncode for process in processes] == [2, 2], output
    assert "BAD  recipe" in output
    assert "BAD  run.output_dir" in output
    assert "does not see what others write; choose a shared run.output_dir" in output


def test_a_network_interface_that_is_not_there_is_named(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    environment = {"GLOO_SOCKET_IFNAME": "nosuch0"}
    ranks = Ranks("doctor", [recipe()], cwd=tmp_path, world_size=2, environment=environment)
    assert ranks.wait() == [2, 2], ranks.output
    assert "error: the processes cannot start together" in ranks.output
    assert "nosuch0" in ranks.output
    assert "set GLOO_SOCKET_IFNAME" in ranks.output
    assert "Traceback" not in ranks.output


@pytest.mark.parametrize(("seconds", "fine"), [(0.001, None), (0.01, False)])
def test_a_slow_bus_between_gpus_of_one_machine_is_bad(
    monkeypatch: pytest.MonkeyPatch, seconds: float, fine: bool | None
) -> None:
    """100 MiB among 8 GPUs in a millisecond are 184 GB/s on the bus, in ten 18."""

    class EightGpus(Group):
        def each(self, value: Any) -> list[Any]:
            return [value] * 8

    monkeypatch.setattr(command, "fastest", lambda act, device: seconds)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    monkeypatch.setattr(command.dist, "get_backend", lambda: "nccl")
    bus, _ = command.traffic(EightGpus(0, 8, None), torch.device("cuda"))
    assert bus.ok is fine
    assert ("NCCL_DEBUG" in bus.message) == (fine is False)
