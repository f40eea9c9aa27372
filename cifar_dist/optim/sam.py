"""Sharpness-aware minimization: the gradient at weights perturbed along the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cifar_dist.utils.config import Positive, config

TINY = 1e-12  # added to the norm: a zero gradient gives a zero perturbation


@config
class SamConfig:
    """Take the gradient at weights perturbed by `rho` in the direction of the gradient.

    Foret et al. 2021 (arXiv 2010.01412): e = rho * g / |g|. With `adaptive`, Kwon et al. 2021 (arXiv
    2102.11600): e = rho * T^2 g / |T g|, where T is |w| + eta for parameters named `...weight` and 1
    for others, as in their code, whose rho is ten times as large.
    """

    rho: Positive = 0.05  # length of the perturbation; about ten times as large with `adaptive`
    adaptive: bool = False  # scale the perturbation by the size of each weight (ASAM)
    eta: Positive = 0.01  # added to the size of each weight with `adaptive`, for weights near zero

    @contextmanager
    def perturbed_weights(
        self, parameters: Sequence[tuple[str, nn.Parameter]], gradients: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """Perturb the weights inside the context; restore them bit for bit afterwards.

        `parameters` are (name, parameter), `gradients` theirs, up to a common factor. Yields f32 []:
        1, or NaN if a gradient is not finite; the caller multiplies it into the results.
        """
        weights: list[Tensor] = [parameter.detach() for _, parameter in parameters]
        steps: list[Tensor] = list(gradients)
        scales: list[Tensor | float] = [1.0] * len(weights)
        if self.adaptive:
            for index, (name, parameter) in enumerate(parameters):
                if name.endswith("weight"):
                    scales[index] = parameter.detach().abs() + self.eta
            steps = [scale * step for scale, step in zip(scales, steps, strict=True)]
        norm = nn.utils.get_total_norm(steps)
        if self.adaptive:
            steps = [scale * step for scale, step in zip(scales, steps, strict=True)]
        originals = [weight.clone() for weight in weights]
        torch._foreach_add_(weights, torch._foreach_mul(steps, self.rho / (norm + TINY)))
        try:
            yield torch.where(norm.isfinite(), 1.0, torch.nan)
        finally:
            torch._foreach_copy_(weights, originals)
