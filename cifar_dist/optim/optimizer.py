"""Floor 2. Any optimizer that timm's factory knows, and the learning rate of every step."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import Tensor, nn

from cifar_dist.optim.sam import SamConfig
from cifar_dist.utils.config import Factor, NonNegative, Positive, Share, config
from cifar_dist.utils.errors import UserError


@config
class OptimConfig:
    """The optimizer, its groups, and its schedule; times in epochs."""

    name: str = "adamw"  # timm's names: "sgd" is Nesterov's, "momentum" is the plain one
    lr: Positive = 0.001
    weight_decay: NonNegative = 0.0
    momentum: Share = 0.9  # used where the optimizer has one, as are betas and eps
    betas: tuple[Share, Share] | None = None
    eps: Positive | None = None
    decay_norm_and_bias: bool = False
    layer_decay: Factor | None = (
        None  # the head learns at lr, each layer below at this times as much
    )
    max_grad_norm: Positive | None = None
    schedule: Literal["constant", "multistep", "cosine", "one_cycle"] = "cosine"
    warmup_epochs: NonNegative = 0.0
    milestones: tuple[float, ...] = ()
    gamma: Positive = 0.1
    final_lr_fraction: Share = 0.0
    sam: SamConfig | None = None  # two forwards and backwards a step

    def __post_init__(self) -> None:
        if self.milestones and self.schedule != "multistep":
            raise ValueError(
                f"milestones belong to schedule: multistep, not to {self.schedule}: remove one"
            )
        if self.layer_decay is not None and self.decay_norm_and_bias:
            raise ValueError(
                "layer_decay groups parameters with norms and biases undecayed: remove it, or "
                "decay_norm_and_bias"
            )


# What the step cannot keep its promises with, by the beginning of the name.
UNSUPPORTED = {
    "adahessian": "needs second derivatives, which the step does not take",
    "kron": "draws random numbers of its own, so a run would not resume to the same bits",
    "bnb": "is bitsandbytes', which is not installed",
    "fused": "is apex's, which is not installed (torch's own are fused already)",
}


def build_optimizer(
    config: OptimConfig, model: nn.Module, unfreeze_epochs: Mapping[str, int | None] | None = None
) -> torch.optim.Optimizer:
    """timm's optimizer over the parameters of `model` that learn; fused where torch has it so.

    Unless `decay_norm_and_bias`, norms, biases and what the model itself names are not decayed.
    With `layer_decay` (Bao et al. 2022, arXiv 2106.08254) groups have an `lr_scale`, by the model's
    `group_matcher`. LAMB does not clip beside the step. Muon leaves the head and what the model does
    not decay to AdamW, as its author does (Jordan et al. 2024). What `begins` to learn in another epoch
    has groups of its own: torch's fused SGD needs the momentum of all of a group or none. UserError for a name that timm lacks.
    """
    names = list_optimizers()
    name = config.name.removeprefix("lookahead_")
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3) or names
        raise UserError(f"optim.name: timm has no {config.name!r}; choose {', '.join(close)}")
    for start, reason in UNSUPPORTED.items():
        if name.startswith(start):
            raise UserError(
                f"optim.name: {name} {reason}; choose adamw, sgd, lamb, muon or another"
            )
    options: dict[str, Any] = {"betas": config.betas, "eps": config.eps}
    options = {key: value for key, value in options.items() if value is not None}
    kind = get_optimizer_class(name, bind_defaults=False)
    # Lookahead's own part would not hear that the fused one left an update out
    if kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW) and name == config.name:
        options["fused"] = True
    if "lamb" in name:
        options["max_grad_norm"] = None
    if name.endswith("muon"):
        options |= {"fallback_list": ("head.*",), "fallback_no_weight_decay": True}
    if hasattr(model, "group_matcher"):
        options["layer_decay"] = config.layer_decay
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        optimizer = create_optimizer_v2(
            learning if config.decay_norm_and_bias else model,
            config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **options,
        )
    except (ValueError, LookupError) as error:  # of its own numbers: betas, eps, momentum
        raise UserError(f"optim: {config.name} cannot be had with these numbers: {error}") from None
    if type(optimizer) is torch.optim.SGD and config.momentum:
        # Fused SGD leaves a momentum as memory happens to be where its first update is left out.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    if unfreeze_epochs:
        split_groups(
            optimizer, {id(p): unfreeze_epochs[name] for name, p in model.named_parameters()}
        )
    return optimizer


def split_groups(optimizer: torch.optim.Optimizer, marks: Mapping[int, object]) -> None:
    """Divide each group by what its parameters are marked with, by id; in place, as wrappers share it."""
    divided = []
    for group in optimizer.param_groups:
        parts: dict[object, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(marks[id(parameter)], []).append(parameter)
        divided += [group | {"params": part} for part in parts.values()]
    optimizer.param_groups[:] = divided


def max_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Return the largest learning rate of the groups where the schedule's is `lr`."""
    return lr * max(group.get("lr_scale", 1.0) for group in optimizer.param_groups)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate to `lr` times its `lr_scale`, in place where it is a tensor."""
    for group in optimizer.param_groups:
        value = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):  # a captured graph reads the tensor it was made with
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let what changes from step to step be tensors there, which a captured graph reads."""
    # torch warns of the eager steps before the recording
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        if "capturable" in group:
            group["capturable"] = True


HYPERPARAMS = ("weight_decay", "betas", "eps", "momentum", "nesterov", "lr_scale")  # a recipe's


def load_portable_state_dict(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Go on from a `saved_state`, with the recipe's numbers; UserError for another optimizer's state."""
    groups = optimizer.param_groups
    numbers = [{name: group[name] for name in HYPERPARAMS if name in group} for group in groups]
    try:
        optimizer.load_state_dict(state)
    except (ValueError, LookupError) as error:
        raise UserError(
            f"the saved optimizer is another ({error}), so this change cannot go on from its state; "
            "give the run a name (name=...)"
        ) from None
    for group, own in zip(optimizer.param_groups, numbers, strict=True):
        group |= own


def portable_state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state dict, the same wherever it keeps its scalars."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:  # copies of the optimizer's own
        group["lr"] = float(group["lr"])
        if "capturable" in group:
            group["capturable"] = False
    return state
