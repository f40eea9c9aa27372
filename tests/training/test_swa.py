"""SWA against a manual average, BatchNorm updates for any world size, and resuming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from averages import fill, scalar_model
from compare import assert_same_bits, lines, tensors
from launcher import Launch, train
from restarts import kill_and_resume
from torch import nn

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.batches import epoch_order
from cifar_dist.data.dataset import load_split
from cifar_dist.distributed.context import DistContext as RankGroup
from cifar_dist.evaluation.evaluator import update_bn
from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.optim.averaging import Swa
from cifar_dist.recipe.load import validate
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker

SWA = {"kind": "swa", "decay": 0.999, "start_epoch": 2}  # the tests' recipe has another decay


def test_swa_averages_epoch_ends_equally() -> None:
    model = scalar_model(0.0)
    swa: Any = Swa(model, start_epoch=2, steps_per_epoch=3)
    seen = []
    for step in range(1, 13):
        fill(model, float(step))
        swa.update(model, step)
        seen.append(swa.model.weight.item())
    # epochs end after 3, 6, 9 and 12 updates: the first is before the start, the mean is of the rest
    assert seen == [0, 0, 3, 3, 3, 6, 6, 6, 7.5, 7.5, 7.5, 9]
    assert swa.model.count.item() == 12
    assert [swa.needs_bn_update(step) for step in (3, 6, 8, 9, 12)] == [False] * 3 + [True] * 2


def test_bn_update_is_the_mean_over_blocks(middle_data: Path) -> None:
    """600 rows are two blocks of 250 images of epoch 3, without dropout."""
    split = load_split(middle_data, "train")
    rows = torch.arange(600)
    augment = Augment(AugmentConfig(crop_padding=4, hflip=True), split)
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone="test_resnet", drop_rate=0.5), 100).eval()
    before = copy.deepcopy(model)
    update_bn(
        model,
        augment,
        split,
        rows,
        seed=7,
        epoch=3,
        precision="fp32",
        context=RankGroup(0, 1, None),
    )
    order = epoch_order(rows, seed=7, epoch=3, shuffle=True)
    first: Any = next(m for m in before.modules() if isinstance(m, nn.BatchNorm2d))
    actual: Any = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    inputs: list[torch.Tensor] = []
    first.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    for begin in (0, 250):
        batch = take_view(split, augment, order[begin : begin + 250], epoch=3)
        with torch.no_grad():
            before(batch)
    mean = torch.stack([given.mean((0, 2, 3)) for given in inputs]).mean(0)
    variance = torch.stack([given.transpose(0, 1).flatten(1).var(1) for given in inputs]).mean(0)
    torch.testing.assert_close(actual.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.running_var, variance, rtol=1e-4, atol=1e-5)
    assert actual.momentum == first.momentum
    assert not any(module.training for module in model.modules())
    for (name, ours), theirs in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_frozen_statistics_do_not_change(middle_data: Path) -> None:
    """Layers behind a frozen norm were trained with its statistics."""
    split = load_split(middle_data, "train")
    model = build_model(ModelConfig(backbone="test_resnet"), 100).eval()
    norms: Any = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    kept = next(iter(norms))
    before = {name: norm.running_var.clone() for name, norm in norms.items()}
    update_bn(
        model,
        Augment(AugmentConfig(), split),
        split,
        torch.arange(600),
        seed=7,
        epoch=3,
        precision="fp32",
        context=RankGroup(0, 1, None),
        frozen={f"{kept}.weight", f"{kept}.bias"},
    )
    same = {name for name, norm in norms.items() if torch.equal(norm.running_var, before[name])}
    assert same == {kept}


def take_view(split: Any, augment: Augment, rows: torch.Tensor, *, epoch: int) -> torch.Tensor:
    from cifar_dist.data.batches import gather_batch

    return augment(gather_batch(split, rows, epoch=epoch, micro_batch=0)).images


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.fault)])
def test_same_bits_for_any_world_size(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path, precision: str
) -> None:
    """One block of 250 rows for each of two ranks; evaluated again from the files."""
    path = recipe(
        run={"precision": precision, "batch_size": 100, "epochs": 4},
        data={"path": str(middle_data)},
        averaging=SWA,
    )
    for world_size in (1, 2):
        train(path, f"name=w{world_size}", cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w2")
    ranks = Launch("evaluate", ["runs/w2"], cwd=tmp_path)
    assert ranks.wait() == [0], ranks.output
    assert "the same bits as" in ranks.output, ranks.output


def test_average_is_evaluated_and_resumes_with_the_same_bits(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    """Kills before and after averaging starts, and in an epoch without an evaluation."""
    path = recipe(run={"epochs": 8, "eval_every_epochs": 2}, averaging=SWA | {"start_epoch": 3})
    train(path, "name=straight", cwd=tmp_path)
    kill_and_resume(path, tmp_path, [4, 15, 28, 37], last_step=48)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/killed")
    actual = tensors(tmp_path / "runs/straight")
    moved = [
        name
        for name in actual
        if name.startswith("model.")
        and not torch.equal(actual[name], actual[name.replace("model.", "average.", 1)])
    ]
    assert any("running_mean" in name for name in moved)
    assert any("weight" in name for name in moved)


def test_averaging_does_not_change_training(tmp_path: Path, recipe: RecipeMaker) -> None:
    train(recipe("with_swa", averaging=SWA), cwd=tmp_path)
    train(recipe("without", averaging=None), cwd=tmp_path)
    one, other = tensors(tmp_path / "runs/with_swa"), tensors(tmp_path / "runs/without")
    assert all(torch.equal(one[name], other[name]) for name in other if name.startswith("model."))
    trained = [
        [line for line in lines(tmp_path / "runs" / name) if line["kind"] == "train"]
        for name in ("with_swa", "without")
    ]
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    ("averaging", "sentence"),
    [
        ({"kind": "swa"}, "need each other"),
        ({"start_epoch": 3}, "need each other"),
        ({"kind": "swa", "start_epoch": 3, "decay": 0.9}, "remove them"),
        ({"kind": "swa", "start_epoch": 300}, "start_epoch=300 must be at most run.epochs=200"),
    ],
)
def test_invalid_averaging_is_refused(averaging: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        validate({"name": "a", "averaging": averaging}, where="here")
