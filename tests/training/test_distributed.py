"""Results do not depend on the number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits, largest_difference, lines, tensors
from launcher import Launch, train, weight_hashes
from safetensors.torch import load_file

from recipes import RecipeMaker

RUN_8 = {"batch_size": 16, "micro_batches": 8, "epochs": 3}


def summary(run: Path) -> dict[str, object]:
    return json.loads((run / "summary.json").read_text())


def test_one_and_two_processes_have_the_same_bits_in_fp16(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    path = recipe(run={"precision": "fp16"})
    for world_size in (1, 2):
        output = train(path, f"name=w{world_size}", cwd=tmp_path, world_size=world_size)
        assert f"{world_size} process(es) on cpu" in output
        assert summary(tmp_path / f"runs/w{world_size}")["world_size"] == world_size
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w2")


def test_plain_accelerator_trains_like_the_command(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run={"epochs": 1})
    train(path, "name=command", cwd=tmp_path, world_size=2)
    for world_size in (1, 2):
        name = f"name=plain_{world_size}"
        ranks = Launch("plain_accelerator", [path, name], cwd=tmp_path, world_size=world_size)
        assert ranks.wait() == [0] * world_size, ranks.output
        assert_same_bits(tmp_path / f"runs/plain_{world_size}", tmp_path / "runs/command")
    assert ranks.output.count("static_graph=True broadcast_buffers=False") == 2, ranks.output


AUGMENT = {"trivial_augment": {}, "one_of": {"affine": {"degrees": 15}, "erasing": {}}}
SECTIONS: dict[str, dict[str, Any]] = {
    "adamw, mixing, dropout, an average": {"augment": AUGMENT},
    "bf16": {"run": {"precision": "bf16"}, "augment": AUGMENT},
    "sam": {"optim": {"name": "sgd", "lr": 0.05, "sam": {"rho": 0.05}}},
    "swa": {"averaging": {"kind": "swa", "decay": 0.999, "start_epoch": 1}},
}
SLOW = ("sam", "swa")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.fault if c in SLOW else ()) for c in SECTIONS]
)
def test_one_two_and_four_processes_have_the_same_bits(
    tmp_path: Path, recipe: RecipeMaker, case: str
) -> None:
    """Weights, averages, optimizer, predictions and all logged numbers, with eight micro-batches."""
    sections = SECTIONS[case]
    path = recipe(**sections | {"run": RUN_8 | sections.get("run", {})})
    for world_size in (1, 2, 4):
        train(path, f"name=w{world_size}", cwd=tmp_path, world_size=world_size)
    for world_size in (2, 4):
        assert_same_bits(tmp_path / "runs/w1", tmp_path / f"runs/w{world_size}")


@pytest.mark.fault  # eight processes on two cores
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eight_processes_have_the_same_bits(
    tmp_path: Path, recipe: RecipeMaker, precision: str
) -> None:
    path = recipe(run=RUN_8 | {"precision": precision})
    for world_size in (1, 8):
        train(path, f"name=w{world_size}", cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w8")


def test_other_numbers_of_processes_agree_up_to_rounding(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path
) -> None:
    """Three processes for four micro-batches, and accumulation in sequence instead of the tree.

    Three processes for three micro-batches have the same bits as one.
    """
    path = recipe(
        run={"batch_size": 250, "micro_batches": 4, "epochs": 2},
        data={"path": str(middle_data)},
        optim={"name": "sgd", "lr": 0.005},  # a large one makes rounding grow from step to step
    )
    train(path, "name=w1", cwd=tmp_path)
    output = train(path, "name=w3", cwd=tmp_path, world_size=3)
    assert "3 processes give the results of one up to rounding" in output
    train(path, "name=sequence", "run.reduction=ddp", cwd=tmp_path)
    for name in ("w3", "sequence"):
        difference = largest_difference(tmp_path / "runs/w1", tmp_path / f"runs/{name}")
        assert 0 < difference < 1e-5, f"{name}: {difference}"
    for world_size in (1, 3):
        words = (f"name=three_{world_size}", "run.micro_batches=3")
        assert "up to rounding" not in train(path, *words, cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/three_1", tmp_path / "runs/three_3")


def test_micro_batches_only_change_rounding_without_batch_norm(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    """24 steps of SGD in float32 with a ViT, whose normalization does not depend on micro-batches."""
    for micro_batches in (1, 4):
        train(
            recipe(
                f"s{micro_batches}",
                run={"micro_batches": micro_batches, "epochs": 4},
                model={"backbone": "test_vit", "drop_rate": 0.0},
                optim={"name": "sgd", "lr": 0.01, "max_grad_norm": None},
            ),
            cwd=tmp_path,
        )
    assert lines(tmp_path / "runs/s1")[-1]["step"] == 24
    assert largest_difference(tmp_path / "runs/s1", tmp_path / "runs/s4") < 1e-6


def test_batch_norm_keeps_statistics_of_micro_batch_zero(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    """With BatchNorm the number of micro-batches changes the result by more than rounding."""
    for micro_batches in (1, 2):
        train(recipe(f"s{micro_batches}", run={"micro_batches": micro_batches}), cwd=tmp_path)
    assert largest_difference(tmp_path / "runs/s1", tmp_path / "runs/s2") > 1e-3


def test_predictions_do_not_depend_on_world_size(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path
) -> None:
    """Evaluation on two ranks uses rank 0's statistics."""
    path = recipe(
        run={"batch_size": 50, "epochs": 1},
        data={"path": str(middle_data)},
        model={"image_size": 80},  # 300 rows are two blocks of an evaluation
    )
    train(path, cwd=tmp_path, world_size=2)
    for world_size in (1, 2, 3):
        ranks = Launch("evaluate", ["runs/tiny"], cwd=tmp_path, world_size=world_size)
        assert ranks.wait() == [0] * world_size, ranks.output
        assert "the same bits as" in ranks.output, ranks.output


def test_ranks_hold_equal_weights(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Each rank hashes its weights after four steps."""
    path = recipe(run={"micro_batches": 4, "batch_size": 12, "epochs": 1})
    assert len(set(weight_hashes(path, cwd=tmp_path))) == 1


def test_more_processes_than_micro_batches_are_refused(tmp_path: Path, recipe: RecipeMaker) -> None:
    output = train(recipe(), cwd=tmp_path, world_size=3, expect=2)
    assert output.count("error:") == 1
    assert "run.micro_batches=3" in output


def test_default_micro_batches_are_the_first_world_size(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    path = recipe(run={"micro_batches": None})
    train(path, cwd=tmp_path, world_size=2)
    assert summary(tmp_path / "runs/tiny")["micro_batches"] == 2


def test_finished_run_has_all_metrics_and_files(tmp_path: Path, recipe: RecipeMaker) -> None:
    train(recipe(data={"val_size": 0}), cwd=tmp_path, world_size=2)
    run = tmp_path / "runs/tiny"
    logged = lines(run)
    trains = [line["step"] for line in logged if line["kind"] == "train"]
    evals = [line["step"] for line in logged if line["kind"] == "eval"]
    assert trains == [5, 10, 15, 20, 24]
    assert evals == [6, 12, 18, 24]
    predictions = load_file(run / "predictions.safetensors")
    top1 = 100 * (predictions["logits"].argmax(1) == predictions["labels"]).float().mean().item()
    logged_summary = summary(run)
    assert logged_summary["top1"] == pytest.approx(top1, abs=1e-4)
    assert logged_summary["finished"] is True
    assert logged_summary["epochs"] == 4
    assert logged_summary["best_test_top1"] == max(
        line["top1"] for line in logged if line["kind"] == "eval"
    )
    assert not (run / "lock").exists()
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert len(list((run / "checkpoints").iterdir())) == 1  # the clock never asked for another
    assert torch.isfinite(torch.stack([t.double().sum() for t in tensors(run).values()])).all()


def test_ddp_overlaps_reduction_with_backward(tmp_path: Path) -> None:
    """In a trace of ResNet-18 (45 MB of gradients), all buckets but the last are sent during the backward."""
    ranks = Launch("overlap_rank", ["trace.json"], cwd=tmp_path, world_size=2)
    assert ranks.wait() == [0, 0], ranks.output
    trace = json.loads((tmp_path / "trace.json").read_text())
    ((begins, _),) = trace["backward"]
    reductions = sorted(trace["gloo:all_reduce"])
    assert len(reductions) >= 2
    last_computed = reductions[-1][0]  # the last bucket leaves when all is computed
    assert reductions[0][0] - begins < 0.6 * (last_computed - begins)
