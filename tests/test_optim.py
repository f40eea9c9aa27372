"""Schedules at points done by hand, and optimizers with their groups."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from cifar_dist.errors import UserError
from cifar_dist.learn.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate


def rates(config: OptimConfig, epochs: int, steps_per_epoch: int) -> list[float]:
    """The learning rate of every update of a run."""
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


def test_cosine_by_hand():
    config = OptimConfig(lr=2, schedule="cosine", final_lr_fraction=0.5)
    found = rates(config, 4, 3)
    assert found[0] == 2
    assert found[6] == pytest.approx(1.5)  # halfway
    assert found[4] == pytest.approx(1.75)  # a third: 1 + (1 + cos 60 degrees) / 2
    end = learning_rate(config, 12, total_steps=12, steps_per_epoch=3)
    assert end == pytest.approx(1)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_no_jumps_up_to_the_peak_and_down(schedule):
    config = OptimConfig(lr=1, schedule=schedule, warmup_epochs=2)
    found = rates(config, 20, 50)
    peak = found.index(max(found))
    assert max(found) == pytest.approx(1)
    assert peak in (99, 100)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    assert max(abs(a - b) for a, b in itertools.pairwise(found)) < 0.02
    assert 0 < found[-1] < 1e-5


def test_one_cycle_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    oracle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=60)
    for found in rates(OptimConfig(lr=0.4, schedule="one_cycle"), 6, 10):
        assert found == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()


@pytest.mark.parametrize("schedule", ["constant", "multistep", "cosine", "one_cycle"])
@pytest.mark.parametrize("warmup_epochs", [0, 1, 5])
def test_short_runs_and_long_warmups_are_defined(schedule, warmup_epochs):
    config = OptimConfig(lr=1, schedule=schedule, warmup_epochs=warmup_epochs)
    for epochs, steps_per_epoch in ((1, 1), (1, 2), (3, 4)):
        assert all(0 < rate <= 1 for rate in rates(config, epochs, steps_per_epoch))


# ----------------------------------------------------------------------------- optimizers


def decays(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """The weight decay of each parameter, by its id."""
    return {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}


def test_norms_biases_and_what_the_model_names_are_not_decayed():
    model = timm.create_model("test_vit")
    found = decays(build_optimizer(OptimConfig(weight_decay=0.1), model))
    for name, parameter in model.named_parameters():
        spared = parameter.ndim <= 1 or name in model.no_weight_decay()
        assert found[id(parameter)] == (0 if spared else 0.1), name
    every = build_optimizer(OptimConfig(weight_decay=0.1, decay_norm_and_bias=True), model)
    assert set(decays(every).values()) == {0.1}
    assert len(decays(every)) == len(list(model.parameters()))


@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_frozen_parameters_stay_out(decay_norm_and_bias):
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
def test_torchs_own_are_fused(name, kind, nesterov):
    optimizer = build_optimizer(OptimConfig(name=name), nn.Linear(2, 2))
    assert type(optimizer) is kind
    assert all(group["fused"] for group in optimizer.param_groups)
    assert optimizer.param_groups[0].get("nesterov") is nesterov


@pytest.mark.parametrize(
    "name", ["lamb", "lion", "muon", "adafactor", "rmsprop", "lookahead_adamw"]
)
def test_others_of_timms_step_too(name):
    model = nn.Linear(3, 3)
    config = OptimConfig(name=name, lr=0.01, betas=(0.8, 0.9), eps=1e-7, momentum=0.5)
    optimizer = build_optimizer(config, model)
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_betas_eps_and_momentum_arrive_where_they_are_taken():
    config = OptimConfig(betas=(0.8, 0.9), eps=1e-7, momentum=0.5)
    adamw = build_optimizer(config, nn.Linear(2, 2)).param_groups[0]
    assert (adamw["betas"], adamw["eps"]) == ((0.8, 0.9), 1e-7)
    sgd = build_optimizer(replace(config, name="sgd"), nn.Linear(2, 2)).param_groups[0]
    assert sgd["momentum"] == 0.5


@pytest.mark.parametrize("name", ["adamwx", "my_adamw", "zzz"])
def test_an_unknown_name_is_one_sentence_with_a_remedy(name):
    with pytest.raises(UserError, match=rf"timm has no '{name}'; choose .*adam"):
        build_optimizer(OptimConfig(name=name), nn.Linear(2, 2))


def test_the_learning_rate_is_set_in_every_group():
    model = nn.Linear(2, 2)
    groups: list[dict[str, Any]] = [
        {"params": [model.weight], "lr_scale": 0.5},
        {"params": [model.bias]},
    ]
    optimizer = torch.optim.SGD(groups, lr=1)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.25]


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor():
    rate = torch.tensor(1.0)
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=rate, fused=True)
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.25
