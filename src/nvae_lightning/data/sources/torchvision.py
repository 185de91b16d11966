"""MNIST and CIFAR-10 in the folders that torchvision makes."""

from pathlib import Path

import numpy as np
from torchvision import datasets

from nvae_lightning.data.sources.base import ArraySource, Splits, Wanted

_CIFAR10 = "cifar-10-batches-py"


def find(path: Path, wanted: Wanted) -> Splits | None:
    """Find either dataset.

    Raises:
        ValueError: If its files are damaged.
    """
    root = mnist_root(path)
    try:
        if (root / "MNIST" / "raw").is_dir():
            splits = [datasets.MNIST(root, train=train).data.numpy() for train in (True, False)]
            return _splits("MNIST", [pixels[..., None] for pixels in splits])
        root = path.parent if path.name == _CIFAR10 else path
        if (root / _CIFAR10).is_dir():
            splits = [datasets.CIFAR10(root, train=train).data for train in (True, False)]
            return _splits("CIFAR-10", splits)
    except Exception as error:  # torchvision asserts what it expects, and unpickles
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"'{path}' is not whole ({reason}); fetch it again") from error
    return None


def mnist_root(path: Path) -> Path:
    """Return the folder that torchvision calls root, also for those in it."""
    if path.parts[-2:] == ("MNIST", "raw"):
        return path.parents[1]
    return path.parent if path.name == "MNIST" and (path / "raw").is_dir() else path


def _splits(name: str, pixels: list[np.ndarray]) -> Splits:
    return Splits(name, {"train": ArraySource(pixels[0]), "test": ArraySource(pixels[1])})
