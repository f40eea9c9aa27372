"""Read weights from files without running code, and load them into a backbone."""

from __future__ import annotations

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
from cifar_dist.utils.files import try_read_json

log = logging.getLogger(__name__)
StateDict = Mapping[str, Tensor]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a .safetensors or torch file, without wrappers' prefixes."""
    if not path.is_file():
        raise UserError(f"model.weights: there is no file {path}; give the path of a weights file")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
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
        raise UserError(
            f"model.weights: {path} has no state dict (a dict of tensors); save one with "
            "safetensors.torch.save_file"
        )
    state = {}
    for name, value in content.items():
        while name.startswith(("module.", "_orig_mod.")):
            name = name.partition(".")[2]
        state[name] = value
    return state


def normalization_from_config(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and std from timm's config.json in the folder of a weights file, if there is one."""
    try:
        cfg = (try_read_json(path.parent / "config.json") or {})["pretrained_cfg"]
        mean, std = (tuple(float(value) for value in cfg[name]) for name in ("mean", "std"))
    except (ValueError, KeyError, TypeError):
        return None  # no such file, or not timm's
    return mean, std


def split_state(state: StateDict) -> tuple[StateDict, StateDict]:
    """Return (backbone's tensors, head's tensors); no head unless it is a Classifier's state dict."""
    if not any(name.startswith("backbone.") for name in state):
        return state, {}
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts["backbone"], parts["head"]


def load_backbone(backbone: nn.Module, state: StateDict, cfg: Any, source: str) -> None:
    """Load `state` by name, or in order if no name but every shape fits; else raise UserError.

    Files in the format of a model's authors first go through timm's converter of the architecture.
    """
    classifier = (cfg.classifier,) if isinstance(cfg.classifier, str) else cfg.classifier or ()
    dropped = {f"{layer}.{kind}" for layer in classifier for kind in ("weight", "bias")}
    target = backbone.state_dict()

    converted = dict(state)
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert and shapes(state) != shapes(target):
        with suppress(Exception):  # it may fail on another format in any way: then load unconverted
            converted = dict(convert(dict(state), backbone))
    loaded = {name: value for name, value in converted.items() if name not in dropped}
    if not loaded.keys() & target.keys():
        in_order = match_in_order(state, target)
        if in_order is None:
            raise UserError(
                f"{source}: neither names nor shapes fit {cfg.architecture} (it has "
                f"{next(iter(state), 'nothing')!r}, the model {next(iter(target))!r}); "
                "check model.backbone"
            )
        log.info("%s: all shapes fit, but no names; loaded in order", source)
        loaded = in_order

    problems = mismatches(loaded, target)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{source} does not fit {cfg.architecture}: {'; '.join(problems[:3])}{more}; "
            "check model.backbone, model.stem and model.image_size"
        )
    load_state(backbone, loaded)


def mismatches(loaded: StateDict, target: StateDict) -> list[str]:
    """Return one phrase for each tensor that is missing, unknown, or of another shape."""
    return [
        *(f"{name} is missing" for name in target if name not in loaded and affects_output(name)),
        *(f"{name} is unknown" for name in loaded if name not in target),
        *(
            f"{name} is {list(value.shape)}, not {list(target[name].shape)}"
            for name, value in loaded.items()
            if name in target and value.shape != target[name].shape
        ),
    ]


def load_state(module: nn.Module, state: StateDict) -> None:
    """Load tensors by name; meta tensors have no data to copy, so they replace the module's."""
    is_meta = any(tensor.is_meta for tensor in state.values())
    module.load_state_dict(state, strict=False, assign=is_meta)


def match_in_order(state: StateDict, target: StateDict) -> dict[str, Tensor] | None:
    """Return `state` under the names of `target`, or None unless the shapes agree in order.

    A classifier may follow in `state`; it is dropped.
    """
    sources = [item for item in state.items() if affects_output(item[0])]
    targets = [item for item in target.items() if affects_output(item[0])]
    if not len(targets) <= len(sources) <= len(targets) + 2:  # a classifier's weight and bias
        return None
    kinds = ("weight", "bias", "running_mean", "running_var")
    matched = {}
    for (source_name, value), (name, target_value) in zip(sources, targets, strict=False):
        kind = source_name.rpartition(".")[2]
        # A safetensors file is sorted by name, which would permute the four vectors of a norm.
        if kind in kinds and kind != name.rpartition(".")[2]:
            return None
        if value.shape != target_value.shape:
            return None
        matched[name] = value
    return matched


def affects_output(name: str) -> bool:
    """Return False for BatchNorm's step counter, which some files lack."""
    return not name.endswith("num_batches_tracked")


def unshared(state: StateDict) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU; safetensors refuses names that share a tensor."""
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in state.items()
    }


def shapes(state: StateDict) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
