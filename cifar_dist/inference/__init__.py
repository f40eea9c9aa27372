"""Load trained models and runs: evaluate, predict, combine and cache logits."""
