"""Floor 0. All randomness is a pure function of a key; keys are mixed by a hash, not by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A seed below 2^63 for these parts; other parts, or another order, give an unrelated one.

    torch's CPU generator starts from the low 32 bits: two keys in four billion have the same stream.
    """
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator at the start of the stream that belongs to these parts."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@dataclass(frozen=True, kw_only=True)
class KeyedRandom:
    """Columns of random numbers, one for each of `rows` rows, on the CPU.

    Each column has a stream of its own, keyed by (what, its name, seed, view): no column moves another.
    """

    what: str
    seed: int
    view: int
    rows: int
    prefix: str = ""

    def scoped(self, name: str) -> KeyedRandom:
        """The draws of one part, whose columns are called `name.column`."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def stream(self, column: str) -> torch.Generator:
        return generator(self.what, self.prefix + column, self.seed, self.view)

    def integers(self, column: str, low: int, high: int, *shape: int) -> Tensor:
        """low ... high - 1, int64 [rows, *shape]."""
        return torch.randint(low, high, (self.rows, *shape), generator=self.stream(column))

    def uniform(self, column: str, low: float, high: float, *shape: int) -> Tensor:
        """low ... high, f64 [rows, *shape]."""
        drawn = torch.rand(self.rows, *shape, generator=self.stream(column), dtype=torch.float64)
        return low + (high - low) * drawn
