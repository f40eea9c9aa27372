"""The doctor passes where training can start, and names the problem where it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import Launch, free_port, rank_variables, start_rank, train

import cifar_dist.training.launch_check as command
from cifar_dist.distributed.context import DistContext
from recipes import RecipeMaker, TeacherMaker, with_teachers


def doctor(*arguments: object, cwd: Path, world_size: int = 2) -> tuple[int | None, dict[str, str]]:
    """Return the exit code, which all ranks share, and the lines of the table by check."""
    ranks = Launch("doctor", arguments, cwd=cwd, world_size=world_size)
    codes = set(ranks.wait())
    assert len(codes) == 1, ranks.output
    table = [line for line in ranks.output.splitlines() if line[:3] in ("ok ", "BAD", "   ")]
    return codes.pop(), {line[5:].split()[0]: line for line in table}


@pytest.mark.parametrize("world_size", [1, 2])
def test_working_launch_passes(tmp_path: Path, recipe: RecipeMaker, world_size: int) -> None:
    code, table = doctor(recipe(), cwd=tmp_path, world_size=world_size)
    assert code == 0, table
    assert f"{world_size} x cpu" in table["devices"]
    assert f"2 micro-batches of 10 rows on {world_size} processes" in table["micro_batches"]
    assert all(table[name].startswith("ok ") for name in ("code", "data", "recipe"))
    assert ("all-reduce" in table) == (world_size == 2)
    assert list((tmp_path / "runs").iterdir()) == []


def test_missing_data_and_idle_ranks_fail(tmp_path: Path, recipe: RecipeMaker) -> None:
    code, table = doctor(recipe(data={"path": "nowhere"}, run={"micro_batches": 1}), cwd=tmp_path)
    assert code == 2
    assert table["data"].startswith("BAD")
    assert table["micro_batches"].startswith("BAD")
    assert "start at most 1" in table["micro_batches"]


@pytest.mark.parametrize("problem", ["only a digest", "too few rows", "output is a file"])
def test_bad_data_or_output_is_a_line_of_the_table(
    tmp_path: Path, recipe: RecipeMaker, data: Path, problem: str
) -> None:
    keys: dict[str, dict[str, object]] = {}
    match problem:
        case "only a digest":
            (tmp_path / "data").mkdir()
            shutil.copy(data / "digest.json", tmp_path / "data")
            keys, line, message = {"data": {"path": "data"}}, "data", "is missing"
        case "too few rows":
            keys, line, message = (
                {"run": {"batch_size": 100_000}},
                "data",
                "exceeds the 64",
            )
        case _:
            (tmp_path / "runs").touch()
            line, message = "run.output_dir", "choose another path"
    code, table = doctor(recipe(**keys), cwd=tmp_path)
    assert code == 2
    assert table[line].startswith("BAD")
    assert message in table[line]
    assert table["micro_batches"].startswith("ok ")


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"model": {"backbone": "test_resnett"}}, "model"),
        ({"optim": {"name": "adamv"}}, "model"),
        ({"model": {"weights": "absent.pth"}}, "weights"),
        ({"data": {"long_tail": {"imbalance": 2}}}, "data"),
        (with_teachers("absent"), "teachers"),
        (with_teachers("big", placement="cached") | {"augment": {"views": 2}}, "teachers"),
    ],
)
def test_message_of_training_is_a_line_of_the_table(
    tmp_path: Path,
    recipe: RecipeMaker,
    teacher: TeacherMaker,
    sections: dict[str, Any],
    line: str,
) -> None:
    teacher("big")
    path = recipe(**sections)
    message = train(path, cwd=tmp_path, expect=2).partition("error: ")[2].strip()
    code, table = doctor(path, cwd=tmp_path)
    assert code == 2
    assert table[line].startswith("BAD")
    assert table[line].endswith(message)
    assert sum(checked.startswith("BAD") for checked in table.values()) == 1


def test_cached_teacher_and_saved_weights_pass(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    teacher("big")
    path = recipe(
        run={"precision": "auto", "epochs": 1},
        augment={"views": 2},
        **with_teachers("big", placement="cached"),
    )
    assert Launch("cache_logits", [path], cwd=tmp_path).wait() == [0]
    train(path, cwd=tmp_path)
    code, table = doctor(path, "run.epochs=2", cwd=tmp_path, world_size=1)
    assert code == 0, table
    assert table["teachers"].split() == ["ok", "teachers", "runs/big"]
    assert "runs/tiny/checkpoints/step_" in table["weights"]


def test_pretrained_weights_without_network_fail(
    tmp_path: Path, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read by the import of a new interpreter
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    command = ["-m", "cifar_dist.doctor", recipe(model={"pretrained": True, "drop_rate": 0.0})]
    process = start_rank(command, cwd=tmp_path, rank=0, world_size=1, port=free_port())
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "BAD  weights        model.pretrained: the weights of test_resnet are not in" in output
    assert "set model.weights=PATH" in output


def test_different_recipes_and_unshared_folders_fail(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Two machines without a shared folder: each rank has a different run.output_dir."""
    port, path = free_port(), recipe()
    launches = []
    for rank in range(2):
        cwd = tmp_path / f"machine{rank}"
        cwd.mkdir()
        words, environment = [path, f"run.seed={rank}"], rank_variables(rank, 2, port)
        launches.append(Launch("doctor", words, cwd=cwd, environment=environment))
    codes, output = [launch.wait() for launch in launches], launches[0].output
    assert codes == [[2], [2]], output
    assert "BAD  recipe" in output
    assert "BAD  run.output_dir" in output
    assert "does not see the files of other ranks; choose a shared run.output_dir" in output


def test_unknown_network_interface_is_named(tmp_path: Path, recipe: RecipeMaker) -> None:
    environment = {"GLOO_SOCKET_IFNAME": "nosuch0"}
    ranks = Launch("doctor", [recipe()], cwd=tmp_path, world_size=2, environment=environment)
    assert ranks.wait() == [2, 2], ranks.output
    assert "error: the process group cannot start" in ranks.output
    assert "nosuch0" in ranks.output
    assert "set GLOO_SOCKET_IFNAME" in ranks.output
    assert "Traceback" not in ranks.output


@pytest.mark.parametrize(("seconds", "ok"), [(0.001, None), (0.01, False)])
def test_slow_bus_between_gpus_of_one_machine_fails(
    monkeypatch: pytest.MonkeyPatch, seconds: float, ok: bool | None
) -> None:
    """100 MiB between 8 GPUs in 1 ms are 184 GB/s on the bus; in 10 ms, 18 GB/s."""

    class EightGpus(DistContext):
        def all_gather_object(self, value: Any) -> list[Any]:
            return [value] * 8

    monkeypatch.setattr(command, "fastest", lambda function, device: seconds)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    monkeypatch.setattr(command.dist, "get_backend", lambda: "nccl")
    bus, _ = command.check_bandwidth(EightGpus(0, 8, None), torch.device("cuda"))
    assert bus.ok is ok
    assert ("NCCL_DEBUG" in bus.message) == (ok is False)
