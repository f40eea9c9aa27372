"""Image augmentation driven by per-epoch parameter tables."""
