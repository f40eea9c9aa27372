"""Floor 2. Where SAM looks for the steeper gradient: a step uphill from the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cifar_dist.utils.config import Positive, config

TINY = 1e-12  # beside the norm, so that a gradient of zero is a step of zero


@config
class SamConfig:
    """Sharpness-aware minimisation: the gradient is taken `rho` uphill of the weights.

    Foret et al. 2021 (arXiv 2010.01412): e = rho * g / |g|. With `adaptive`, Kwon et al. 2021 (arXiv
    2102.11600): e = rho * T^2 g / |T g|, T = |w| + eta for a parameter that is called `...weight` and
    1 for others, as in their code, whose rho is ten times as large.
    """

    rho: Positive = 0.05
    adaptive: bool = False
    eta: Positive = 0.01  # of `adaptive`: weights near zero move too

    @contextmanager
    def perturbed_weights(
        self, parameters: Sequence[tuple[str, nn.Parameter]], gradients: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """Within, the weights are those uphill; afterwards, the very bits from before.

        `parameters` are (name, parameter), `gradients` theirs times any one number. Yields f32 []:
        1, or NaN where a gradient is not finite; what is multiplied by it is as broken as they are.
        """
        weights: list[Tensor] = [parameter.detach() for _, parameter in parameters]
        steps: list[Tensor] = list(gradients)
        scales: list[Tensor | float] = [1.0] * len(weights)
        if self.adaptive:
            for place, (name, parameter) in enumerate(parameters):
                if name.endswith("weight"):
                    scales[place] = parameter.detach().abs() + self.eta
            steps = [scale * step for scale, step in zip(scales, steps, strict=True)]
        norm = nn.utils.get_total_norm(steps)
        if self.adaptive:
            steps = [scale * step for scale, step in zip(scales, steps, strict=True)]
        kept = [weight.clone() for weight in weights]
        torch._foreach_add_(weights, torch._foreach_mul(steps, self.rho / (norm + TINY)))
        try:
            yield torch.where(norm.isfinite(), 1.0, torch.nan)
        finally:
            torch._foreach_copy_(weights, kept)
