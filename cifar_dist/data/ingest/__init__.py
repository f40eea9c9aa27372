"""Convert the published CIFAR-100 archive to an Arrow dataset."""
