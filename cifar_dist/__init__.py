"""cifar_dist: CIFAR-100, trained on one process or many, the same numbers either way."""

__version__ = "0.1.0"
