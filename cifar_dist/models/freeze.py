"""Freeze parameters, for good or for the first epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_dist.utils.config import Count, config
from cifar_dist.utils.errors import UserError


@config
class FreezeConfig:
    """Freeze the parameters whose names match `pattern`, a file-name pattern like `backbone.*`."""

    pattern: str  # file-name pattern of parameter names, like backbone.*
    until_epoch: Count | None = None  # number of epochs they are frozen for; null: the whole run


def freeze(model: nn.Module, freezes: Sequence[FreezeConfig] | None, *, epoch: int | None) -> bool:
    """Set `requires_grad` of each parameter for `epoch`; return whether any value changed.

    Epochs count from 0; None keeps trainable whatever is trained in any epoch. A BatchNorm whose
    parameters are all frozen is put in eval mode: it uses its running statistics and keeps them.
    Raise UserError for a pattern without a match and if no parameter is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for freeze_config in freezes or ():
        pattern = freeze_config.pattern
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(sorted({".".join(name.split(".")[:2]) + ".*" for name in names})[:6])
            raise UserError(f"model.freeze: no parameter matches {pattern!r}; there are {some}")
    unfreeze_epochs = find_unfreeze_epochs(model, freezes)
    changed = False
    for name, parameter in model.named_parameters():
        trainable = is_trainable(unfreeze_epochs[name], epoch)
        changed |= parameter.requires_grad != trainable
        parameter.requires_grad_(trainable)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        when = "any epoch" if epoch is None else f"epoch {epoch + 1}"
        raise UserError(
            f"model.freeze: all parameters are frozen in {when}; leave out head.* at least"
        )
    for module in model.modules():
        parameters = list(module.parameters())
        if isinstance(module, _BatchNorm) and parameters:
            module.train(any(parameter.requires_grad for parameter in parameters))
    return changed


def is_trainable(unfreeze_epoch: int | None, epoch: int | None) -> bool:
    """Return whether a parameter is trained in `epoch` (None: in any epoch)."""
    return unfreeze_epoch is not None and (epoch is None or unfreeze_epoch <= epoch)


def frozen_parameters(unfreeze_epochs: Mapping[str, int | None], epoch: int) -> set[str]:
    """Return the names of the parameters that are frozen in `epoch`."""
    return {name for name, first in unfreeze_epochs.items() if not is_trainable(first, epoch)}


def find_unfreeze_epochs(
    model: nn.Module, freezes: Sequence[FreezeConfig] | None
) -> dict[str, int | None]:
    """Return the first epoch (from 0) in which each parameter is trained; None: never."""
    unfreeze_epochs: dict[str, int | None] = {}
    for name, _ in model.named_parameters():
        ends = [f.until_epoch for f in freezes or () if fnmatchcase(name, f.pattern)]
        unfreeze_epochs[name] = (
            None if None in ends else max((end for end in ends if end), default=0)
        )
    return unfreeze_epochs
