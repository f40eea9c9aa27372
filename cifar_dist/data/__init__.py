"""Floor 1. From CIFAR's pickles to uint8 pictures on the device."""
