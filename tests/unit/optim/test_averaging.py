"""The exponential moving average: hand-computed values and exact resumption."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from averages import fill, scalar_model
from torch import nn

from cifar_dist.optim.averaging import AveragingConfig, Ema, build_average
from cifar_dist.utils.errors import UserError


def test_parameters_are_averaged_and_buffers_copied():
    model = scalar_model(0.0)
    ema: Any = Ema(AveragingConfig(decay=0.75, warmup=False), model)
    for step, (value, average) in enumerate([(1.0, 0.25), (1.0, 0.4375), (5.0, 1.578125)], 1):
        fill(model, value)
        ema.update(model, step)
        assert ema.model.weight.item() == average
        assert ema.model.count.item() == value


def test_warmup_lowers_the_decay_of_the_first_updates():
    model = scalar_model(0.0)
    ema: Any = Ema(AveragingConfig(decay=0.2), model)
    fill(model, 1.0)
    ema.update(model, 1)  # decay 2/11, under 0.2
    torch.testing.assert_close(ema.model.weight.detach(), torch.tensor([9 / 11]))
    ema.update(model, 2)  # decay 3/12, capped at 0.2
    torch.testing.assert_close(ema.model.weight.detach(), torch.tensor([9 / 11 + 0.8 * 2 / 11]))


def test_warmup_counts_averagings_not_steps():
    model = scalar_model(0.0)
    ema: Any = Ema(AveragingConfig(every_steps=5), model)
    fill(model, 1.0)
    ema.update(model, 5)
    torch.testing.assert_close(ema.model.weight.detach(), torch.tensor([9 / 11]))


def test_every_steps_skips_the_steps_between():
    model = scalar_model(0.0)
    ema: Any = Ema(AveragingConfig(decay=0.5, every_steps=3, warmup=False), model)
    fill(model, 1.0)
    seen = []
    for step in range(1, 7):
        ema.update(model, step)
        seen.append(ema.model.weight.item())
    assert seen == [0, 0, 0.5, 0.5, 0.5, 0.75]


def test_every_steps_above_the_total_steps_is_an_error():
    config = AveragingConfig(every_steps=11)
    with pytest.raises(UserError, match=r"averaging\.every_steps=11 is more than all 10 steps"):
        build_average(config, scalar_model(0.0), steps_per_epoch=5, total_steps=10)
    build_average(config, scalar_model(0.0), steps_per_epoch=5, total_steps=11)


def test_average_is_a_separate_frozen_model_in_eval_mode():
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    ema: Any = Ema(AveragingConfig(), model)
    assert model.training
    assert not any(module.training for module in ema.model.modules())
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(torch.randn(4, 2))
    ema.update(model, 1)
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert ema.model[1].running_mean is not model[1].running_mean


def test_resuming_gives_the_same_bits():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(20)]
    config = AveragingConfig(decay=0.9, every_steps=2)
    through = Ema(config, models[0])
    for step in range(1, 20):
        through.update(models[step], step)
        if step == 7:
            saved = copy.deepcopy(through.model.state_dict())
    resumed = Ema(config, models[3])  # its initial model does not matter
    resumed.model.load_state_dict(saved)
    for step in range(8, 20):
        resumed.update(models[step], step)
    for result, expected in zip(
        resumed.model.state_dict().values(), through.model.state_dict().values(), strict=True
    ):
        assert torch.equal(result, expected)
