"""MNIST and CIFAR-10 in torchvision's layout."""

import os
from pathlib import Path

from torchvision import datasets

from nvae_lightning.data.files import check_bytes, leads_out
from nvae_lightning.data.messages import one_line
from nvae_lightning.data.readers.base import ArraySource, Pixels, Splits, Wanted
from nvae_lightning.data.readers.container import Container, Folder

CIFAR10 = "cifar-10-batches-py"
MNIST = "MNIST/raw"
DIGITS = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}


def find(container: Container, wanted: Wanted) -> Splits | None:
    """Find either dataset.

    Raises:
        ValueError: If its files are damaged.
    """
    for name, place, read in (("MNIST", MNIST, _digits), ("CIFAR-10", CIFAR10, _photographs)):
        root = torchvision_root(container.path, place)
        check_files(root, place)
        if not (root / place).is_dir():
            continue
        try:
            sources = {split: ArraySource(read(root, split)) for split in DIGITS}
        except Exception as error:  # torchvision asserts and unpickles
            raise ValueError(
                f"'{container.path}' is damaged ({one_line(error)}); fetch it again"
            ) from error
        files = Folder(root)
        return Splits(name, sources, files.unread({f for f in files.names if f.startswith(place)}))
    return None


def _digits(root: Path, split: str) -> Pixels:
    path = root / MNIST / DIGITS[split]
    return datasets.mnist.read_image_file(str(path)).unsqueeze(-1).numpy()


def _photographs(root: Path, split: str) -> Pixels:
    # Before it unpickles a file, torchvision compares all with their checksums.
    return datasets.CIFAR10(root, train=split == "train").data


def torchvision_root(path: Path, place: str) -> Path:
    """Return torchvision's root, also for the folders that lead to the files in it.

    Args:
        path: Root, or a folder below it.
        place: Folder of the files, relative to the root.
    """
    for root in path.parents:
        files = root / place
        if files == path or (files.is_relative_to(path) and files.is_dir()):
            return root
    return path


def check_files(root: Path, place: str) -> None:
    """Check that torchvision opens only regular files of a bounded size below a root.

    Raises:
        ValueError: If one is a link to outside, a pipe, a device, a socket or too large.
    """
    folder = root / place
    if not os.path.lexists(folder):
        return
    for path in (folder, *(folder.iterdir() if folder.is_dir() else ())):
        if leads_out(path, root):
            raise ValueError(
                f"'{path}' is a link to a file outside '{root}'; put the files themselves there, "
                "or set dataset.root to where they are"
            )
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"'{path}' is not a regular file; remove it")
        if path.is_file():
            check_bytes(path.stat().st_size)
