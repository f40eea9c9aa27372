"""A model of one number."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def one_number(value: float) -> Any:
    """A model of one parameter and one buffer."""
    model: Any = nn.Module()
    model.weight = nn.Parameter(torch.tensor([value]))
    model.register_buffer("count", torch.tensor([value]))
    return model


def set_to(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)
