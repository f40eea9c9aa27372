"""Floor 1. Weights from a file: read without running code, and fitted to a backbone or refused."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cifar_dist.utils.errors import UserError

log = logging.getLogger(__name__)
State = Mapping[str, Tensor]


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors or torch file, wrappers' prefixes removed; runs no code."""
    if not path.is_file():
        raise UserError(f"model.weights: there is no file {path}; give the path of a weights file")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile file makes the readers raise
        raise UserError(
            f"model.weights: {path} is not a file of plain tensors ({type(error).__name__}); "
            "save its state dict with safetensors.torch.save_file and give that"
        ) from error
    for nest in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise UserError(f"model.weights: {path} holds no state dict (a dict of tensors); save one")
    state = {}
    for name, value in content.items():
        while name.startswith(("module.", "_orig_mod.")):
            name = name.partition(".")[2]
        state[name] = value
    return state


def normalization_from_config(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation of the pixels that a file's network takes, where timm's config.json lies beside it."""
    try:
        found = json.loads((path.parent / "config.json").read_text())["pretrained_cfg"]
        mean, std = (tuple(float(value) for value in found[name]) for name in ("mean", "std"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # none, or of another kind
    return mean, std


def split_state(state: State) -> tuple[State, State]:
    """(backbone's tensors, head's tensors); the latter only from a state dict of a `Classifier`."""
    if not any(name.startswith("backbone.") for name in state):
        return state, {}
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts["backbone"], parts["head"]


def load_backbone(backbone: nn.Module, state: State, cfg: Any, source: str) -> None:
    """Load `state` by name, or in order where no name but every shape fits; else UserError.

    Files in their authors' format go through timm's converter for the architecture first.
    """
    classifier = (cfg.classifier,) if isinstance(cfg.classifier, str) else cfg.classifier or ()
    dropped = {f"{layer}.{kind}" for layer in classifier for kind in ("weight", "bias")}
    wanted = backbone.state_dict()

    converted = dict(state)
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert and shapes(state) != shapes(wanted):
        # A converter may stumble over a format that it does not know, in any way: then the file as it is.
        with suppress(Exception):
            converted = dict(convert(dict(state), backbone))
    found = {name: value for name, value in converted.items() if name not in dropped}
    if not found.keys() & wanted.keys():
        in_order = match_in_order(state, wanted)
        if in_order is None:
            raise UserError(
                f"{source}: neither names nor shapes fit {cfg.architecture} (it has "
                f"{next(iter(state), 'nothing')!r}, the model {next(iter(wanted))!r}); "
                "check model.backbone"
            )
        log.info("%s: no name fits, every shape does; loaded in order", source)
        found = in_order

    problems = [
        f"{name} is missing" for name in wanted if name not in found and affects_output(name)
    ]
    problems += [f"{name} is unknown" for name in found if name not in wanted]
    problems += [
        f"{name} is {list(value.shape)}, not {list(wanted[name].shape)}"
        for name, value in found.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{source} does not fit {cfg.architecture}: {'; '.join(problems[:3])}{more}; "
            "check model.backbone, model.stem and model.image_size"
        )
    load_state(backbone, found)


def load_state(module: nn.Module, state: State) -> None:
    """Load by name; tensors on the meta device, which have no numbers to copy, take the places."""
    is_meta = any(tensor.is_meta for tensor in state.values())
    module.load_state_dict(state, strict=False, assign=is_meta)


def match_in_order(state: State, wanted: State) -> dict[str, Tensor] | None:
    """`state` under the names of `wanted` if the shapes agree one to one, but for a last layer."""
    theirs = [item for item in state.items() if affects_output(item[0])]
    ours = [item for item in wanted.items() if affects_output(item[0])]
    if not len(ours) <= len(theirs) <= len(ours) + 2:  # a classifier's weight and bias may follow
        return None
    kinds = ("weight", "bias", "running_mean", "running_var")
    for (their_name, their_value), (our_name, our_value) in zip(theirs, ours, strict=False):
        kind = their_name.rpartition(".")[2]
        # A safetensors file is sorted by name: the four vectors of a norm would change places.
        if kind in kinds and kind != our_name.rpartition(".")[2]:
            return None
        if their_value.shape != our_value.shape:
            return None
    return {ours[index][0]: theirs[index][1] for index in range(len(ours))}


def affects_output(name: str) -> bool:
    """Whether a tensor says anything about the function: BatchNorm's step counter does not."""
    return not name.endswith("num_batches_tracked")


def shapes(state: State) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
