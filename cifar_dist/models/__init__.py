"""Networks: backbones, heads, preprocessing, weights."""
