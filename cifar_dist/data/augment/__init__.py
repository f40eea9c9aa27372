"""Image augmentation as tables of parameters."""
