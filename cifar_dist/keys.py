"""Floor 0. All randomness is a pure function of a key; keys are mixed by a hash, not by arithmetic."""

from __future__ import annotations

from hashlib import blake2b

import torch


def key(*parts: int | str) -> int:
    """A seed below 2^63 for these parts; other parts, or another order, give an unrelated one."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator at the start of the stream that belongs to these parts."""
    return torch.Generator().manual_seed(key(*parts))
