"""Small-map convolutions as matrix products match the convolution in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.models.small_maps import SmallMapConv2d, replace_small_map_convs


@pytest.mark.parametrize("side", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_match_a_convolution(side: int, stride: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, 3, stride=stride, padding=1, bias=bias).double()
    small = nn.Conv2d(5, 7, 3, stride=stride, padding=1, bias=bias).double()
    small.load_state_dict(plain.state_dict())
    replace_small_map_convs(small)
    assert type(small) is SmallMapConv2d
    for layer in plain, small:
        layer.to(memory_format=torch.channels_last)
    images = torch.randn(6, 5, side, side, dtype=torch.double)
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((plain, small), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    direction = torch.randn_like(outputs[0])
    for output in outputs:
        (output * direction).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for one, other in zip(plain.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
        assert other.grad is not None
        assert other.grad.stride() == other.stride()  # fused optimizers err silently otherwise


def test_other_convolutions_are_not_replaced() -> None:
    others = nn.Sequential(
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(4, 4, 3, padding=1),
    )
    kinds = [type(module) for module in others]
    replace_small_map_convs(others)
    assert [type(module) for module in others] == kinds


def test_resnet18_at_32_px_matches_plain_convolutions() -> None:
    model = build_model(ModelConfig(backbone="resnet18"), 100).eval()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        result = model(images).logits
        for module in model.modules():
            if type(module) is SmallMapConv2d:
                module.__class__ = nn.Conv2d  # type: ignore[assignment]
        torch.testing.assert_close(result, model(images).logits)
