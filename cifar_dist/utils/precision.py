"""Numeric precision: autocast, loss scaling, and device support."""

from __future__ import annotations

from typing import Literal

import torch

from cifar_dist.utils.errors import UserError

Precision = Literal["bf16", "fp16", "fp32"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise UserError for bf16 on a GPU that only emulates it, such as a T4."""
    if (
        precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{name} does not support bf16; set run.precision=fp16")


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the autocast context of a precision; it is disabled for fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def make_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Return a loss scaler, which is enabled only for fp16."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
