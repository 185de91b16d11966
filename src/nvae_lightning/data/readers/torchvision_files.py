"""MNIST and CIFAR-10 in torchvision's layout."""

import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from torchvision import datasets

from nvae_lightning.data.files import leads_out, open_regular, read_regular
from nvae_lightning.data.names import one_line
from nvae_lightning.data.readers.base import ArraySource, Pixels, Splits, Wanted
from nvae_lightning.data.readers.container import Container, Folder

CIFAR10 = "cifar-10-batches-py"
MNIST = "MNIST/raw"
_IDX_OF_BYTES = 0x00000800  # plus the number of dimensions
_MOST_HEADER = 16


def find(container: Container, wanted: Wanted) -> Splits | None:
    """Find either dataset.

    Raises:
        ValueError: If its files are damaged.
    """
    path = container.path
    root = mnist_root(path)
    check_files(root, MNIST)
    photographs = path.parent if path.name == CIFAR10 else path
    check_files(photographs, CIFAR10)
    if (root / MNIST).is_dir():
        with _whole(path):
            check_digits(root)
            train = read_digits(root, "train")
        return _splits("MNIST", root, MNIST, train, partial(read_digits, root, "t10k"))
    if (photographs / CIFAR10).is_dir():
        with _whole(path):  # torchvision compares the checksums of all its files
            train = datasets.CIFAR10(photographs, train=True).data
        test = partial(_test_photographs, photographs)
        return _splits("CIFAR-10", photographs, CIFAR10, train, test)
    return None


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torchvision asserts and unpickles
        raise ValueError(f"'{path}' is damaged ({one_line(error)}); fetch it again") from error


def _test_photographs(root: Path) -> Pixels:
    with _whole(root):
        return datasets.CIFAR10(root, train=False).data


def has_digits(root: Path) -> bool:
    """Whether all four files of MNIST are there."""
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    files = (f"{part}-{kind}" for part in ("train", "t10k") for kind in kinds)
    return all((root / MNIST / file).is_file() for file in files)


def mnist_root(path: Path) -> Path:
    """Return torchvision's root, also for the folders in it."""
    if path.parts[-2:] == ("MNIST", "raw"):
        return path.parents[1]
    return path.parent if path.name == "MNIST" and (path / "raw").is_dir() else path


def check_files(root: Path, folder: str) -> None:
    """Check that torchvision opens only regular files below a root.

    Raises:
        ValueError: If one is a link to outside, a pipe, a device or a socket.
    """
    place = root / folder
    if not os.path.lexists(place):
        return
    for path in (place, *(place.iterdir() if place.is_dir() else ())):
        if leads_out(path, root):
            raise ValueError(
                f"'{path}' is a link to a file outside '{root}'; put the files themselves there, "
                "or set dataset.root to where they are"
            )
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"'{path}' is not a regular file; remove it")


def check_digits(root: Path) -> None:
    """Compare the sizes of MNIST's four files with their headers, without reading the images.

    Raises:
        ValueError: If one is damaged.
        OSError: If one is missing.
    """
    for part in ("train", "t10k"):
        counts = []
        for name, num_dims in (("images-idx3", 3), ("labels-idx1", 1)):
            path = root / MNIST / f"{part}-{name}-ubyte"
            with open_regular(path) as file:
                shape = _idx_shape(file.read(_MOST_HEADER), path, num_dims)
                if os.fstat(file.fileno()).st_size != 4 * (1 + num_dims) + math.prod(shape):
                    raise ValueError(f"'{path.name}' does not hold what its header claims")
            counts.append(shape[0])
        if counts[0] != counts[1]:
            raise ValueError(
                f"there are {counts[0]:,} images of '{part}' and {counts[1]:,} labels"
            )


def read_digits(root: Path, part: str) -> Pixels:
    """Return the images of MNIST's ``train`` or ``t10k``, after `check_digits`.

    Raises:
        OSError: If they cannot be read.
    """
    path = root / MNIST / f"{part}-images-idx3-ubyte"
    content = read_regular(path)
    shape = _idx_shape(content, path, 3)
    return np.frombuffer(content, np.uint8, offset=16).reshape(*shape, 1)


def _idx_shape(content: bytes, path: Path, num_dims: int) -> list[int]:
    """Return the shape in the header of one of MNIST's files."""
    header = struct.Struct(f">{1 + num_dims}I")
    if len(content) < header.size:
        raise ValueError(f"'{path.name}' ends in its header")
    kind, *shape = header.unpack_from(content)
    if kind != _IDX_OF_BYTES + num_dims:
        raise ValueError(f"'{path.name}' does not hold what its header claims")
    return shape


def _splits(
    name: str, root: Path, folder: str, train: Pixels, test: Callable[[], Pixels]
) -> Splits:
    container = Folder(root)
    read = {file for file in container.names if file.startswith(f"{folder}/")}
    sources = {"train": ArraySource(train), "test": ArraySource(test)}
    return Splits(name, sources, container.unread(read))
