"""MNIST and CIFAR-10 in the folders that torchvision makes."""

from pathlib import Path

import numpy as np
from torchvision import datasets

from nvae_lightning.data.sources.base import ArraySource, Splits, Wanted


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
        if (path / "cifar-10-batches-py").is_dir():
            return _splits(
                "CIFAR-10", [datasets.CIFAR10(path, train=train).data for train in (True, False)]
            )
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"'{path}' is not whole ({reason}); fetch it again") from error
    return None


def mnist_root(path: Path) -> Path:
    """Return the folder that torchvision calls root, also for those in it."""
    if path.parts[-2:] == ("MNIST", "raw"):
        return path.parents[1]
    return path.parent if path.name == "MNIST" and (path / "raw").is_dir() else path


def _splits(name: str, pixels: list[np.ndarray]) -> Splits:
    return Splits(name, {"train": ArraySource(pixels[0]), "test": ArraySource(pixels[1])})
