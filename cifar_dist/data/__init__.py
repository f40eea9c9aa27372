"""Data pipeline: from CIFAR's pickle files to augmented uint8 batches on the device."""
