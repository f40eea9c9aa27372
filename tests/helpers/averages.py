"""A model with one parameter, for tests of weight averages."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def scalar_model(value: float) -> Any:
    """Return a model of one parameter and one buffer."""
    model: Any = nn.Module()
    model.weight = nn.Parameter(torch.tensor([value]))
    model.register_buffer("count", torch.tensor([value]))
    return model


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)
