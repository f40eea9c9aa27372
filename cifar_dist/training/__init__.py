"""What a training consists of around its loop, which is in `cifar_dist/train.py`."""
