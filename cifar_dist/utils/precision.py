"""Numeric precision: autocast, loss scaling, and what a device supports."""

from __future__ import annotations

from typing import Literal

import torch

from cifar_dist.utils.errors import UserError

Precision = Literal["bf16", "fp16", "fp32"]


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse bf16 where the device only emulates it (a T4 claims to support it, by emulation)."""
    if (
        precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{name} has no bf16; add run.precision=fp16")


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Autocast to the recipe's precision; float32 turns it off."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def make_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler that fp16 needs; it does nothing for bf16 and fp32."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
