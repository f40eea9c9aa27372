"""Models: backbones, heads, preprocessing, and weights."""
