"""run.precision=auto, and the warning where a CPU emulates a precision.

ONEDNN_MAX_CPU_ISA=AVX2 makes any x86 CPU emulate bf16.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from launcher import Launch, free_port, rank_variables, train

from cifar_dist.utils.precision import auto_precision, is_native
from recipes import RecipeMaker

CPU = torch.device("cpu")
EMULATING = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
AUTO = "run.precision=auto"
ONE_EPOCH = {"run": {"epochs": 1, "precision": "auto"}}
WARNING = "no {} instructions and emulates them"

native_bf16 = pytest.mark.skipif(not is_native("bf16", CPU), reason="this CPU emulates bf16")


def stored_precision(folder: Path) -> str:
    return yaml.safe_load((folder / "runs/tiny/recipe.yaml").read_text())["run"]["precision"]


def test_auto_is_fp32_on_a_cpu_that_emulates_bf16_and_is_stored(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    output = train(recipe(**ONE_EPOCH), cwd=tmp_path, world_size=2, environment=EMULATING)
    assert "2 process(es) on cpu, fp32," in output
    assert "emulates" not in output
    assert stored_precision(tmp_path) == "fp32"


def test_auto_is_the_native_precision_of_this_machine(tmp_path: Path, recipe: RecipeMaker) -> None:
    train(recipe(**ONE_EPOCH), cwd=tmp_path)
    assert stored_precision(tmp_path) == auto_precision(CPU)


def test_auto_keeps_the_precision_of_the_first_start(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run={"epochs": 1, "precision": "bf16"})
    first = train(path, cwd=tmp_path, environment=EMULATING)
    assert first.count(WARNING.format("bf16")) == 1
    assert "set run.precision=fp32" in first

    assert "finished, top1" in train(path, AUTO, cwd=tmp_path, environment=EMULATING)
    (tmp_path / "runs/tiny/summary.json").unlink()
    resumed = train(path, AUTO, cwd=tmp_path, environment=EMULATING)
    assert "on cpu, bf16," in resumed
    assert resumed.count(WARNING.format("bf16")) == 1
    assert "resuming from step 6" in resumed
    assert stored_precision(tmp_path) == "bf16"


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.fault)])
def test_two_ranks_that_emulate_a_precision_print_one_warning(
    tmp_path: Path, recipe: RecipeMaker, precision: str
) -> None:
    path = recipe(run={"epochs": 1, "precision": precision})
    output = train(path, cwd=tmp_path, world_size=2, environment=EMULATING)
    assert output.count(WARNING.format(precision)) == 1


@native_bf16
def test_native_bf16_gives_no_warning(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run={"epochs": 1, "precision": "bf16"})
    assert "emulates" not in train(path, cwd=tmp_path)


@native_bf16
def test_auto_on_unequal_processors_is_one_sentence(tmp_path: Path, recipe: RecipeMaker) -> None:
    port, path = free_port(), recipe(**ONE_EPOCH)
    launches = []
    for rank, environment in enumerate(({}, EMULATING)):
        variables = rank_variables(rank, 2, port) | environment
        launches.append(Launch("train", [path], cwd=tmp_path, environment=variables))
    assert [launch.wait() for launch in launches] == [[2], [2]]
    output = "".join(launch.output for launch in launches)
    assert output.count("error: run.precision=auto is bf16 on rank 0 and fp32 on rank 1") == 1
    assert not (tmp_path / "runs/tiny/recipe.yaml").exists()


def test_dry_run_shows_what_auto_means_here(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(**ONE_EPOCH)
    assert "precision         auto (fp32 here)" in train(
        "--dry-run", path, cwd=tmp_path, environment=EMULATING
    )
    plan = json.loads(train("--dry-run", "--json", path, cwd=tmp_path, environment=EMULATING))
    assert (plan["recipe"]["run"]["precision"], plan["precision"]) == ("auto", "fp32")


def test_fp32_is_native_everywhere() -> None:
    assert is_native("fp32", CPU)


def test_a_cpu_without_16_bit_instructions_is_recognized() -> None:
    command = (
        "import torch; from cifar_dist.utils.precision import is_native; "
        "print([is_native(p, torch.device('cpu')) for p in ('bf16', 'fp16')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", command],
        env={"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.stdout.strip() == "[False, False]"
