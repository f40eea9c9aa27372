"""Convolutions of tiny maps as matrix products: the same numbers and gradients as a convolution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cifar_dist.models.backbones import ModelConfig, build_model
from cifar_dist.models.small_maps import SmallMapConv2d, replace_small_map_convs


@pytest.mark.parametrize("side", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_a_convolution(
    side: int, stride: int, bias: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, 3, stride=stride, padding=1, bias=bias).double()
    taps = nn.Conv2d(5, 7, 3, stride=stride, padding=1, bias=bias).double()
    taps.load_state_dict(plain.state_dict())
    replace_small_map_convs(taps)
    assert type(taps) is SmallMapConv2d
    for layer in plain, taps:
        layer.to(memory_format=torch.channels_last)
    images = torch.randn(6, 5, side, side, dtype=torch.double)
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((plain, taps), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    direction = torch.randn_like(outputs[0])
    for output in outputs:
        (output * direction).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for one, other in zip(plain.parameters(), taps.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
        assert other.grad is not None
        assert other.grad.stride() == other.stride()  # or torch's fused optimizers err silently


def test_what_could_be_none_stays_as_it_is() -> None:
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


def test_a_resnet_at_32_px_says_the_same_with_taps_and_with_convolutions() -> None:
    model = build_model(ModelConfig(backbone="resnet18"), 100).eval()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        found = model(images).logits
        for module in model.modules():
            if type(module) is SmallMapConv2d:
                module.__class__ = nn.Conv2d  # type: ignore[assignment]
        torch.testing.assert_close(found, model(images).logits)
