"""Teachers and their cached logits."""
