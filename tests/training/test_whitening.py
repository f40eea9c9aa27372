"""Whitening filters decorrelate patches, are part of the model, and are equal on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compare import assert_same_bits, tensors
from launcher import Launch, train
from torch.nn import functional as F

from cifar_dist.data.dataset import load_split
from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.models.preprocess import (
    CIFAR_MEAN,
    CIFAR_STD,
    WHITENED,
    Preprocess,
    whitening_filters,
)
from recipes import RecipeMaker


def test_whitened_patches_are_uncorrelated_with_unit_variance(middle_data: Path) -> None:
    images = load_split(middle_data, "train").images
    pixels = Preprocess(32, mean=CIFAR_MEAN, std=CIFAR_STD, whiten=True)
    pixels.filters.copy_(whitening_filters(pixels, images, epsilon=0.0))
    answers = pixels(images)[:, :, 1:-1, 1:-1]  # the border includes padding
    covariance = answers.transpose(0, 1).flatten(1).double().cov()
    torch.testing.assert_close(covariance, torch.eye(WHITENED).double(), rtol=0, atol=2e-3)
    plain = Preprocess(32, mean=CIFAR_MEAN, std=CIFAR_STD)(images)
    patches = F.unfold(plain, 3).transpose(0, 1).flatten(1).double()
    assert patches.corrcoef().tril(-1).max() > 0.5, "as they were not before"


def test_filters_do_not_depend_on_processes_or_restarts(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    path = recipe(run={"epochs": 2}, model={"whiten": True})
    train(path, "name=one", cwd=tmp_path)
    train(path, "name=two", cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/one", tmp_path / "runs/two")
    filters = tensors(tmp_path / "runs/one")["model.preprocess.filters"]
    assert filters.shape == (WHITENED, 3, 3, 3)
    assert filters.norm() > 1
    ranks = Launch("evaluate", ["runs/one"], cwd=tmp_path)
    assert ranks.wait() == [0], ranks.output
    assert "the same bits as" in ranks.output, ranks.output


@pytest.mark.parametrize("backbone", ["resnet9", "wrn_10_1", "resnet8x4", "test_vit"])
def test_any_backbone_takes_whitened_input(backbone: str) -> None:
    size = 160 if backbone == "test_vit" else 32
    model = build_model(ModelConfig(backbone=backbone, image_size=size, whiten=True), 10)
    assert model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).logits.shape == (2, 10)
    assert "preprocess.filters" in model.state_dict()


def test_three_channel_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="27 channels"):
        ModelConfig(whiten=True, pretrained=True)
