"""Floor 1. Which parameters do not learn in an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_dist.utils.config import Count, config
from cifar_dist.utils.errors import UserError


@config
class FreezeConfig:
    """Parameters whose name matches `pattern` (`backbone.*`) do not learn, for so many epochs."""

    pattern: str
    until_epoch: Count | None = None  # frozen for the first that many; None: for good


def freeze(model: nn.Module, freezes: Sequence[FreezeConfig] | None, *, epoch: int | None) -> bool:
    """Let learn what learns in `epoch` (from 0; None: in any), nothing else; whether anything has changed.

    BatchNorm all of whose parameters are frozen is in eval mode: its running statistics are used, and
    stay. UserError for a pattern that names nothing, and where nothing is left to learn.
    """
    names = [name for name, _ in model.named_parameters()]
    for each in freezes or ():
        if not any(fnmatchcase(name, each.pattern) for name in names):
            some = ", ".join(sorted({".".join(name.split(".")[:2]) + ".*" for name in names})[:6])
            raise UserError(f"model.freeze: nothing is called {each.pattern!r}; there are {some}")
    begins = find_unfreeze_epochs(model, freezes)
    changed = False
    for name, parameter in model.named_parameters():
        now = is_trainable(begins[name], epoch)
        changed |= parameter.requires_grad != now
        parameter.requires_grad_(now)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"model.freeze: nothing learns in {'any epoch' if epoch is None else f'epoch {epoch + 1}'}; "
            "leave out head.* at least"
        )
    for module in model.modules():
        own = list(module.parameters())
        if isinstance(module, _BatchNorm) and own:
            module.train(any(parameter.requires_grad for parameter in own))
    return changed


def is_trainable(begin: int | None, epoch: int | None) -> bool:
    """Whether what begins to learn in epoch `begin` (None: in none) does so in `epoch` (None: in any)."""
    return begin is not None and (epoch is None or begin <= epoch)


def frozen_parameters(begins: Mapping[str, int | None], epoch: int) -> set[str]:
    """Names of the parameters that do not learn in `epoch`."""
    return {name for name, begin in begins.items() if not is_trainable(begin, epoch)}


def find_unfreeze_epochs(
    model: nn.Module, freezes: Sequence[FreezeConfig] | None
) -> dict[str, int | None]:
    """The epoch (from 0) in which each parameter begins to learn, by its name; None: in none."""
    begins: dict[str, int | None] = {}
    for name, _ in model.named_parameters():
        ends = [each.until_epoch for each in freezes or () if fnmatchcase(name, each.pattern)]
        begins[name] = None if None in ends else max((end for end in ends if end), default=0)
    return begins
