"""Keyed randomness: every random number is a pure function of a key, which is hashed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Return a seed below 2^63 for a key; different parts or another order give an unrelated one.

    torch's CPU generator uses the low 32 bits only, so two keys share a stream with probability 2^-32.
    """
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a new CPU generator that is seeded by a key."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@dataclass(frozen=True, kw_only=True)
class KeyedRandom:
    """Columns of random numbers with `rows` entries each, on the CPU.

    A column's stream is keyed by (purpose, column name, seed, view), so columns are independent:
    adding one does not change the others.
    """

    purpose: str
    seed: int
    view: int
    rows: int
    prefix: str = ""

    def scoped(self, name: str) -> KeyedRandom:
        """Return the same source with columns that are called `name.column`."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def stream(self, column: str) -> torch.Generator:
        return generator(self.purpose, self.prefix + column, self.seed, self.view)

    def integers(self, column: str, low: int, high: int, *shape: int) -> Tensor:
        """Return int64 [rows, *shape], uniform in [low, high)."""
        return torch.randint(low, high, (self.rows, *shape), generator=self.stream(column))

    def uniform(self, column: str, low: float, high: float, *shape: int) -> Tensor:
        """Return f64 [rows, *shape], uniform in [low, high)."""
        unit = torch.rand(self.rows, *shape, generator=self.stream(column), dtype=torch.float64)
        return low + (high - low) * unit
