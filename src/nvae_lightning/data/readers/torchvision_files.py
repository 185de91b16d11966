"""MNIST and CIFAR-10 in the folders that torchvision makes."""

import math
import os
import struct
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from torchvision import datasets

from nvae_lightning.data.files import leads_out, read_regular
from nvae_lightning.data.readers.base import ArraySource, Splits, Wanted
from nvae_lightning.data.readers.container import Folder, unread

CIFAR10 = "cifar-10-batches-py"
MNIST = "MNIST/raw"
_IDX_OF_BYTES = 0x00000800  # plus the number of dimensions


def find(path: Path, wanted: Wanted) -> Splits | None:
    """Find either dataset.

    Raises:
        ValueError: If its files are damaged.
    """
    root = mnist_root(path)
    check_files(root, MNIST)
    photographs = path.parent if path.name == CIFAR10 else path
    check_files(photographs, CIFAR10)
    try:
        if (root / MNIST).is_dir():
            splits = [read_digits(root, part) for part in ("train", "t10k")]
            return _splits("MNIST", root, MNIST, splits)
        root = photographs
        if (root / CIFAR10).is_dir():
            splits = [datasets.CIFAR10(root, train=train).data for train in (True, False)]
            return _splits("CIFAR-10", root, CIFAR10, splits)
    except Exception as error:  # torchvision asserts what it expects, and unpickles
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"'{path}' is not whole ({reason}); fetch it again") from error
    return None


def has_digits(root: Path) -> bool:
    """Whether all four files of MNIST are there."""
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    files = (f"{part}-{kind}" for part in ("train", "t10k") for kind in kinds)
    return all((root / MNIST / file).is_file() for file in files)


def mnist_root(path: Path) -> Path:
    """Return the folder that torchvision calls root, also for those in it."""
    if path.parts[-2:] == ("MNIST", "raw"):
        return path.parents[1]
    return path.parent if path.name == "MNIST" and (path / "raw").is_dir() else path


def check_files(root: Path, folder: str) -> None:
    """Check that what torchvision opens are regular files below a root.

    Raises:
        ValueError: If one is a link that leads out, a pipe, a device or a socket.
    """
    place = root / folder
    if not os.path.lexists(place):
        return
    for path in (place, *(place.iterdir() if place.is_dir() else ())):
        if leads_out(path, root):
            raise ValueError(
                f"'{path}' is a link that leads out of '{root}'; put the files themselves there, "
                "or set dataset.root to where they are"
            )
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"'{path}' is not a regular file; remove it")


def read_digits(root: Path, part: str) -> UInt8[np.ndarray, "count height width channel"]:
    """Return the images of MNIST's ``train`` or ``t10k``.

    Raises:
        ValueError: If one of their files is damaged.
        OSError: If it is missing.
    """
    images = _read_idx(root / MNIST / f"{part}-images-idx3-ubyte", 3)
    labels = _read_idx(root / MNIST / f"{part}-labels-idx1-ubyte", 1)
    if len(labels) != len(images):
        raise ValueError(
            f"there are {len(images):,} images of '{part}' and {len(labels):,} labels"
        )
    return images[..., None]


def _read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Return the array of bytes in one of MNIST's files."""
    content = read_regular(path)
    header = struct.Struct(f">{1 + num_dims}I")
    if len(content) < header.size:
        raise ValueError(f"'{path.name}' ends in its header")
    kind, *shape = header.unpack_from(content)
    if kind != _IDX_OF_BYTES + num_dims or len(content) - header.size != math.prod(shape):
        raise ValueError(f"'{path.name}' does not hold what its header claims")
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape)


def _splits(name: str, root: Path, folder: str, pixels: list[np.ndarray]) -> Splits:
    names, left_out = Folder(root).listing()
    left_out = unread((one for one in names if not one.startswith(f"{folder}/")), left_out)
    sources = {"train": ArraySource(pixels[0]), "test": ArraySource(pixels[1])}
    return Splits(name, sources, left_out)
