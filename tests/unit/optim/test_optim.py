"""Hand-computed learning rates, and optimizers with their parameter groups."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.optim.optimizer import (
    UNSUPPORTED,
    OptimConfig,
    build_optimizer,
    load_portable_state_dict,
    max_lr,
    portable_state_dict,
    set_learning_rate,
)
from cifar_dist.optim.schedule import learning_rate
from cifar_dist.run_folder.checkpoint import load_optimizer, save_checkpoint
from cifar_dist.utils.errors import UserError


def rates(config: OptimConfig, epochs: int, steps_per_epoch: int) -> list[float]:
    """Return the learning rate of every update of a run."""
    total = epochs * steps_per_epoch
    return [
        learning_rate(config, step, total_steps=total, steps_per_epoch=steps_per_epoch)
        for step in range(total)
    ]


# ----------------------------------------------------------------------------- schedules


def test_constant_with_warmup():
    config = OptimConfig(lr=1, schedule="constant", warmup_epochs=0.5)
    assert rates(config, 2, 8) == [0.25, 0.5, 0.75, *[1] * 13]


def test_multistep_counts_milestones_in_epochs():
    config = OptimConfig(lr=1, schedule="multistep", milestones=(1, 2.5), gamma=0.1)
    assert rates(config, 3, 4) == pytest.approx([*[1] * 4, *[0.1] * 6, *[0.01] * 2])


def test_milestones_include_the_warmup_epochs():
    config = OptimConfig(lr=1, schedule="multistep", milestones=(2,), warmup_epochs=1)
    assert rates(config, 3, 4) == pytest.approx([0.25, 0.5, 0.75, *[1] * 5, *[0.1] * 4])


def test_one_cycle_ends_at_final_lr_fraction():
    config = OptimConfig(lr=2, schedule="one_cycle", final_lr_fraction=0.1)
    assert rates(config, 6, 10)[-1] == pytest.approx(0.2)


def test_cosine_hand_computed():
    config = OptimConfig(lr=2, schedule="cosine", final_lr_fraction=0.5)
    result = rates(config, 4, 3)
    assert result[0] == 2
    assert result[6] == pytest.approx(1.5)  # halfway
    assert result[4] == pytest.approx(1.75)  # a third: 1 + (1 + cos 60 degrees) / 2
    end = learning_rate(config, 12, total_steps=12, steps_per_epoch=3)
    assert end == pytest.approx(1)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_warmup_rises_and_decay_falls_smoothly(schedule):
    config = OptimConfig(lr=1, schedule=schedule, warmup_epochs=2)
    result = rates(config, 20, 50)
    peak = result.index(max(result))
    assert max(result) == pytest.approx(1)
    assert peak in (99, 100)
    assert result[: peak + 1] == sorted(result[: peak + 1])
    assert result[peak:] == sorted(result[peak:], reverse=True)
    assert max(abs(a - b) for a, b in itertools.pairwise(result)) < 0.02
    assert 0 < result[-1] < 1e-5


def test_one_cycle_matches_torch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    oracle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=60)
    for result in rates(OptimConfig(lr=0.4, schedule="one_cycle"), 6, 10):
        assert result == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()


@pytest.mark.parametrize("schedule", ["constant", "multistep", "cosine", "one_cycle"])
@pytest.mark.parametrize("warmup_epochs", [0, 1, 5])
def test_rates_are_valid_for_short_runs_and_long_warmups(schedule, warmup_epochs):
    config = OptimConfig(lr=1, schedule=schedule, warmup_epochs=warmup_epochs)
    for epochs, steps_per_epoch in ((1, 1), (1, 2), (3, 4)):
        assert all(0 < rate <= 1 for rate in rates(config, epochs, steps_per_epoch))


# ----------------------------------------------------------------------------- optimizers


def decays(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """Return the weight decay of each parameter, by its id."""
    return {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize(("name", "nesterov"), [("sgd", True), ("momentum", False)])
def test_momentum_matches_torch_from_the_first_step(name, nesterov):
    def weight_after_steps(make: Any) -> torch.Tensor:
        model = nn.Linear(2, 1, bias=False)
        nn.init.ones_(model.weight)
        optimizer = make(model)
        for number in (1.0, 2.0, 4.0):
            model.weight.grad = torch.full_like(model.weight, number)
            optimizer.step()
        return model.weight.detach()

    ours = weight_after_steps(lambda model: build_optimizer(OptimConfig(name=name, lr=0.1), model))
    theirs = weight_after_steps(
        lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=nesterov)
    )
    torch.testing.assert_close(ours, theirs)


def test_loading_a_state_dict_keeps_the_recipes_momentum():
    model = nn.Linear(2, 2)
    before = build_optimizer(OptimConfig(name="sgd", momentum=0.9), model)
    after = build_optimizer(OptimConfig(name="sgd", momentum=0.5), model)
    load_portable_state_dict(after, portable_state_dict(before))
    assert {group["momentum"] for group in after.param_groups} == {0.5}


def test_norms_biases_and_no_weight_decay_parameters_are_not_decayed():
    model = timm.create_model("test_vit")
    result = decays(build_optimizer(OptimConfig(weight_decay=0.1), model))
    for name, parameter in model.named_parameters():
        undecayed = parameter.ndim <= 1 or name in model.no_weight_decay()
        assert result[id(parameter)] == (0 if undecayed else 0.1), name
    every = build_optimizer(OptimConfig(weight_decay=0.1, decay_norm_and_bias=True), model)
    assert set(decays(every).values()) == {0.1}
    assert len(decays(every)) == len(list(model.parameters()))


@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_frozen_parameters_are_in_no_group(decay_norm_and_bias):
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    config = OptimConfig(decay_norm_and_bias=decay_norm_and_bias)
    assert decays(build_optimizer(config, model)).keys() == {id(p) for p in model[1].parameters()}


@pytest.mark.parametrize(
    ("name", "kind", "nesterov"),
    [
        ("sgd", torch.optim.SGD, True),
        ("momentum", torch.optim.SGD, False),
        ("adam", torch.optim.Adam, None),
        ("adamw", torch.optim.AdamW, None),
    ],
)
def test_torchs_optimizers_are_fused(name, kind, nesterov):
    optimizer = build_optimizer(OptimConfig(name=name), nn.Linear(2, 2))
    assert type(optimizer) is kind
    assert all(group["fused"] for group in optimizer.param_groups)
    assert optimizer.param_groups[0].get("nesterov") is nesterov


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext"])
def test_layer_decay_matches_timm(name):
    """The classifiers differ: timm's model has its own, cifar_dist's a head."""
    theirs = timm.create_model(name, num_classes=100)
    oracle = create_optimizer_v2(theirs, "adamw", lr=1, weight_decay=0.1, layer_decay=0.5)
    expected = scales(oracle, theirs)
    model = build_model(ModelConfig(backbone=name, image_size=64, head="cosine"), 100)
    optimizer = build_optimizer(OptimConfig(layer_decay=0.5, weight_decay=0.1), model)
    result = scales(optimizer, model)
    body = {n.removeprefix("backbone."): v for n, v in result.items() if n.startswith("backbone.")}
    assert len(body) > 20
    assert body == {n: expected[n] for n in body}
    head = [scale for n, (scale, _) in result.items() if n.startswith("head.")]
    assert head
    assert set(head) == {1}
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {
        0.25 * scale for scale, _ in result.values()
    }
    assert max_lr(optimizer, 0.25) == 0.25


def scales(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return each parameter's learning rate scale and weight decay, by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_layer_decay_needs_timms_layers_and_excludes_decay_norm_and_bias():
    model = build_model(ModelConfig(backbone="resnet8x4"), 100)
    with pytest.raises(UserError, match="no layers of this backbone; remove it"):
        build_optimizer(OptimConfig(layer_decay=0.5), model)
    with pytest.raises(ValueError, match="remove it, or decay_norm_and_bias"):
        OptimConfig(layer_decay=0.5, decay_norm_and_bias=True)


def test_muon_leaves_the_head_and_undecayed_parameters_to_adamw():
    model = build_model(ModelConfig(backbone="test_vit"), 100)
    optimizer = build_optimizer(OptimConfig(name="muon", weight_decay=0.1), model)
    fallback = {
        name
        for name, parameter in model.named_parameters()
        for group in optimizer.param_groups
        if group.get("use_fallback") and any(parameter is p for p in group["params"])
    }
    assert fallback == {"head.linear.weight", "head.linear.bias", *model.no_weight_decay()}


def test_lamb_does_not_clip_by_itself():
    groups = build_optimizer(OptimConfig(name="lamb"), nn.Linear(2, 2)).param_groups
    assert groups[0]["max_grad_norm"] is None


@pytest.mark.parametrize("name", ["adahessian", "kron", "kronw", "bnbadamw", "fusedlamb"])
def test_unsupported_optimizers_are_an_error(name):
    with pytest.raises(UserError, match=rf"optim\.name: {name} .*; choose adamw"):
        build_optimizer(OptimConfig(name=name), nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "adam"])
def test_a_skipped_first_update_changes_nothing(name):
    """Under fp16 the first gradient scales are often too high, so the first updates are skipped."""

    def train(skips: list[float]) -> nn.Linear:
        torch.manual_seed(0)
        model = nn.Linear(50, 50)
        optimizer = build_optimizer(OptimConfig(name=name, lr=0.01, weight_decay=0.1), model)
        for found_inf in skips:
            junk = [torch.full((50, 50), torch.nan) for _ in range(100)]
            del junk  # fill freed memory with NaN
            model(torch.ones(8, 50)).square().mean().backward()
            optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return model

    one, other = train([1.0, 1.0, 0.0, 0.0]), train([0.0, 0.0])
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


@pytest.mark.parametrize("name", ["lookahead_sgd", "lookahead_adamw"])
def test_lookahead_is_not_fused(name):
    optimizer = build_optimizer(OptimConfig(name=name), nn.Linear(2, 2))
    assert not optimizer.defaults.get("fused")


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name in [*list_optimizers(), "lookahead_adamw"]
        if not name.startswith(tuple(UNSUPPORTED))
    ),
)
def test_every_supported_optimizer_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """Via a checkpoint, with another state of the global random generator."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 5), nn.LayerNorm(5))

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
        for number in range(begin, end):
            images = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(number))
            model(images).pow(3).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    config = OptimConfig(name=name, lr=0.01, weight_decay=0.1)
    through = build()
    optimizer = build_optimizer(config, through)
    steps(through, optimizer, 0, 4)
    weights = copy.deepcopy(through.state_dict())
    saved = save_checkpoint(
        tmp_path,
        step=4,
        tensors={"model": weights},
        optimizer=portable_state_dict(optimizer),
        progress={},
    )
    steps(through, optimizer, 4, 12)
    resumed = build()
    resumed.load_state_dict(weights)
    optimizer = build_optimizer(config, resumed)
    assert load_portable_state_dict(optimizer, load_optimizer(saved))
    torch.rand(3)
    steps(resumed, optimizer, 4, 12)
    for (key, ours), theirs in zip(
        resumed.state_dict().items(), through.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), key
        assert ours.isfinite().all()


@pytest.mark.parametrize(
    "name", ["lamb", "lion", "muon", "adafactor", "rmsprop", "lookahead_adamw"]
)
def test_other_timm_optimizers_take_a_step(name):
    model = nn.Linear(3, 3)
    config = OptimConfig(name=name, lr=0.01, betas=(0.8, 0.9), eps=1e-7, momentum=0.5)
    optimizer = build_optimizer(config, model)
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_betas_eps_and_momentum_are_passed_to_optimizers_that_take_them():
    config = OptimConfig(betas=(0.8, 0.9), eps=1e-7, momentum=0.5)
    adamw = build_optimizer(config, nn.Linear(2, 2)).param_groups[0]
    assert (adamw["betas"], adamw["eps"]) == ((0.8, 0.9), 1e-7)
    sgd = build_optimizer(replace(config, name="sgd"), nn.Linear(2, 2)).param_groups[0]
    assert sgd["momentum"] == 0.5


@pytest.mark.parametrize("name", ["adamwx", "my_adamw", "zzz"])
def test_unknown_name_is_an_error_with_suggestions(name):
    with pytest.raises(UserError, match=rf"timm has no '{name}'; choose .*adam"):
        build_optimizer(OptimConfig(name=name), nn.Linear(2, 2))


def test_learning_rate_is_set_in_every_group():
    model = nn.Linear(2, 2)
    groups: list[dict[str, Any]] = [
        {"params": [model.weight], "lr_scale": 0.5},
        {"params": [model.bias]},
    ]
    optimizer = torch.optim.SGD(groups, lr=1)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.25]


def test_a_tensor_learning_rate_is_updated_in_place():
    rate = torch.tensor(1.0)
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=rate, fused=True)
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.25
