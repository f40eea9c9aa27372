"""Build any optimizer of timm's factory, and set learning rates."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import Tensor, nn

from cifar_dist.optim.sam import SamConfig
from cifar_dist.utils.config import Factor, NonNegative, Positive, Share, config
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.suggest import closest


@config
class OptimConfig:
    """The optimizer, its parameter groups, and its schedule; times are in epochs."""

    # an optimizer of timm; sgd has Nesterov momentum, momentum is SGD with plain momentum
    name: str = "adamw"
    lr: Positive = 0.001  # peak learning rate
    weight_decay: NonNegative = 0.0  # weight decay (norms and biases: see decay_norm_and_bias)
    momentum: Share = 0.9  # momentum, if the optimizer has one
    betas: tuple[Share, Share] | None = None  # betas of Adam and the like; null: the optimizer's
    eps: Positive | None = None  # eps of Adam and the like; null: the optimizer's
    decay_norm_and_bias: bool = False  # apply the weight decay to norms and biases, too
    layer_decay: Factor | None = None  # factor on lr per layer away from the head; null: none
    # norm to which the gradient is clipped; null: no clipping
    max_grad_norm: Positive | None = None
    # learning rate after the warm-up; one_cycle includes its warm-up
    schedule: Literal["constant", "multistep", "cosine", "one_cycle"] = "cosine"
    # epochs of linear warm-up; for one_cycle, epochs until the peak (0: 30 % of the run)
    warmup_epochs: NonNegative = 0.0
    milestones: tuple[float, ...] = ()  # epochs after which multistep multiplies the rate by gamma
    gamma: Positive = 0.1  # factor on the learning rate at each milestone
    final_lr_fraction: Share = 0.0  # last learning rate of cosine and one_cycle as a fraction of lr
    # sharpness-aware minimization, with two forward and backward passes per step; null: off
    sam: SamConfig | None = None

    def __post_init__(self) -> None:
        if self.milestones and self.schedule != "multistep":
            raise ValueError(
                f"milestones need schedule: multistep, not {self.schedule}: remove one"
            )
        if self.layer_decay is not None and self.decay_norm_and_bias:
            raise ValueError(
                "layer_decay never decays norms and biases: remove it, or decay_norm_and_bias"
            )


# Prefixes of names that the training step cannot support, with the reason.
UNSUPPORTED = {
    "adahessian": "needs second derivatives, which the training step does not compute",
    "kron": "draws unseeded random numbers, so a resumed run would differ",
    "bnb": "needs bitsandbytes, which is not installed",
    "fused": "needs apex, which is not installed (torch's own optimizers are already fused)",
}


def build_optimizer(
    config: OptimConfig, model: nn.Module, unfreeze_epochs: Mapping[str, int | None] | None = None
) -> torch.optim.Optimizer:
    """Return timm's optimizer over the trainable parameters of `model`, fused if torch supports it.

    Unless `decay_norm_and_bias`, norms, biases and what `model.no_weight_decay()` names are not
    decayed. With `layer_decay` (Bao et al. 2022, arXiv 2106.08254) groups have an `lr_scale` from the
    model's `group_matcher`. LAMB's own clipping is off. Muon leaves the head and undecayed parameters
    to AdamW, as its author does (Jordan et al. 2024). Parameters with different `unfreeze_epochs` get
    separate groups: torch's fused SGD needs the momentum of all of a group or of none.
    Raise UserError for an unknown or unsupported name and for settings that the optimizer rejects.
    """
    _check_name(config.name)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        optimizer = create_optimizer_v2(
            trainable if config.decay_norm_and_bias else model,
            config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **_factory_options(config, model),
        )
    except (ValueError, LookupError) as error:
        raise UserError(
            f"optim: {config.name} does not accept these settings ({error}); "
            "change momentum, betas or eps"
        ) from None
    if type(optimizer) is torch.optim.SGD and config.momentum:
        # If fused SGD skips its first update, it leaves the momentum uninitialized.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    if unfreeze_epochs:
        by_id = {id(p): unfreeze_epochs[name] for name, p in model.named_parameters()}
        _split_groups(optimizer, by_id)
    return optimizer


def _check_name(full_name: str) -> None:
    names = list_optimizers()
    name = full_name.removeprefix("lookahead_")
    if name not in names:
        choices = closest(name, names) or ", ".join(names)
        raise UserError(f"optim.name: timm has no {full_name!r}; choose {choices}")
    for prefix, reason in UNSUPPORTED.items():
        if name.startswith(prefix):
            raise UserError(
                f"optim.name: {name} {reason}; choose adamw, sgd, lamb, muon or another"
            )


def _factory_options(config: OptimConfig, model: nn.Module) -> dict[str, Any]:
    """Return the options of timm's factory that depend on the optimizer or the model."""
    name = config.name.removeprefix("lookahead_")
    options: dict[str, Any] = {}
    if config.betas is not None:
        options["betas"] = config.betas
    if config.eps is not None:
        options["eps"] = config.eps
    kind = get_optimizer_class(name, bind_defaults=False)
    # Lookahead would not know when the fused optimizer inside it skips an update.
    if kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW) and name == config.name:
        options["fused"] = True
    if "lamb" in name:
        options["max_grad_norm"] = None
    if name.endswith("muon"):
        options |= {"fallback_list": ("head.*",), "fallback_no_weight_decay": True}
    if hasattr(model, "group_matcher"):
        options["layer_decay"] = config.layer_decay
    return options


def _split_groups(optimizer: torch.optim.Optimizer, keys: Mapping[int, object]) -> None:
    """Split each group by its parameters' keys, given by id.

    Done in place, as wrappers such as Lookahead share the list of groups.
    """
    groups = []
    for group in optimizer.param_groups:
        parts: dict[object, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(keys[id(parameter)], []).append(parameter)
        groups += [group | {"params": part} for part in parts.values()]
    optimizer.param_groups[:] = groups


def max_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Return the largest learning rate of the groups when the schedule's is `lr`."""
    return lr * max(group.get("lr_scale", 1.0) for group in optimizer.param_groups)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate to `lr` times its `lr_scale`, in place if it is a tensor."""
    for group in optimizer.param_groups:
        value = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):  # a CUDA graph reads the tensor it was captured with
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Keep the learning rate and step counts in tensors on `device`, for a CUDA graph to read."""
    # torch warns in the eager steps before the capture
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        if "capturable" in group:
            group["capturable"] = True


# Settings that come from the recipe when a run resumes, not from the checkpoint.
HYPERPARAMS = ("weight_decay", "betas", "eps", "momentum", "nesterov", "lr_scale")


def load_portable_state_dict(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> bool:
    """Load a `portable_state_dict`, but keep this optimizer's HYPERPARAMS.

    Return False, without loading anything, if its groups have other numbers of parameters.
    """
    groups, saved = optimizer.param_groups, state["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved]:
        return False
    settings = [{name: group[name] for name in HYPERPARAMS if name in group} for group in groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group |= kept
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # Files store contiguous tensors; fused steps need the strides of the parameter.
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return True


def portable_state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state dict without the effects of `make_capturable`."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:  # copies, not the optimizer's groups
        group["lr"] = float(group["lr"])
        if "capturable" in group:
            group["capturable"] = False
    return state
