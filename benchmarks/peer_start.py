"""Start a process and run one training step, as users of other libraries write it.

Usage: `peer_start.py tutorial FOLDER_OF_PICKLES` or `peer_start.py hugging_face PREPARED_DATA`. Prints
a line after the step.
"""

from __future__ import annotations

import sys


def tutorial(pickles: str) -> None:
    """Use torch, timm and albumentations on the pickles."""
    import os
    import pickle

    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # no version check over the network
    import albumentations  # noqa: F401  imported by the tutorial's data set module
    import numpy as np
    import timm
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Cifar(Dataset[tuple[np.ndarray, int]]):
        def __init__(self, name: str) -> None:
            with open(f"{pickles}/{name}", "rb") as file:
                data = pickle.load(file, encoding="bytes")
            self.images = data[b"data"].reshape(-1, 3, 32, 32)
            self.labels = data[b"fine_labels"]

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return self.images[index].astype(np.float32) / 255.0, self.labels[index]

    train, _ = (DataLoader(Cifar(name), batch_size=250) for name in ("train", "test"))
    model = timm.create_model("resnet18", num_classes=100)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = next(iter(train))
    loss = torch.nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
    loss.backward()
    optimizer.step()
    print(f"step 1: loss {loss.item():.3f}", flush=True)


def hugging_face(data: str) -> None:
    """Use torch, timm, datasets and Accelerate on the Arrow files."""
    import datasets
    import timm
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator()
    train = datasets.load_from_disk(data)["train"].with_format("torch")
    model = timm.create_model("resnet18", num_classes=100)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters()), DataLoader(train, batch_size=250)
    )
    batch = next(iter(loader))
    images = batch["image"].view(-1, 3, 32, 32).float() / 255
    loss = torch.nn.functional.cross_entropy(model(images), batch["fine_label"])
    accelerator.backward(loss)
    optimizer.step()
    print(f"step 1: loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    {"tutorial": tutorial, "hugging_face": hugging_face}[sys.argv[1]](sys.argv[2])
