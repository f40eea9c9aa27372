"""Heads map features to logits; margins and scales belong to the losses.

Heads compute in float32 with autocast disabled: bfloat16 cannot resolve angles under 5 degrees.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HeadName = Literal["linear", "cosine"]


class Outputs(NamedTuple):
    """The outputs of every model, float32 also under autocast."""

    logits: Tensor  # [B, C]
    embedding: Tensor  # [B, D]; compared with the class weights, not normalized
    class_weight: Tensor  # [C, D]


class LinearHead(nn.Module):
    """logits = features @ weight.T + bias; the embedding is the features. Input: [B, in_features]."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes)

    def forward(self, features: Tensor) -> Outputs:
        with torch.autocast(features.device.type, enabled=False):
            embedding = features.float()
            return Outputs(self.linear(embedding), embedding, self.linear.weight)


class CosineHead(nn.Module):
    """logits = cosines between embedding and class weights, -1 to 1. Input: [B, in_features].

    The embedding is a linear layer without bias and BatchNorm1d of the features, not normalized; the
    returned class weights have length 1. Wang et al. 2018 (arXiv 1801.09414), Deng et al. 2019 (arXiv
    1801.07698).
    """

    def __init__(self, in_features: int, num_classes: int, embedding_size: int) -> None:
        super().__init__()
        self.project = nn.Linear(in_features, embedding_size, bias=False)
        self.norm = nn.BatchNorm1d(embedding_size)
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, features: Tensor) -> Outputs:
        with torch.autocast(features.device.type, enabled=False):
            embedding = self.norm(self.project(features.float()))
            class_weight = F.normalize(self.weight)
            cosines = F.linear(F.normalize(embedding), class_weight)
            return Outputs(cosines, embedding, class_weight)
