import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision

from nvae_lightning.data.readers import Source, Wanted, open_source

Read = Callable[[Source], list[np.ndarray]]

COUNTS = {"train": 6, "test": 3}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape) + shape[0]).integers(256, size=shape, dtype=np.uint8)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
    path.write_bytes(header + values.tobytes())


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Six training and three test digits as torchvision unpacks them."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 6), ("t10k", 3)):
        write_idx(raw / f"{name}-images-idx3-ubyte", noise(count, 28, 28))
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.zeros(count, np.uint8))
    return tmp_path


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two training files of three images and a test file of two, in the published layout."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: dict[str, object]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name: str, count: int) -> list[str]:
        return write(name, {"data": noise(count, 3072), "labels": [0] * count})

    original = torchvision.datasets.CIFAR10
    train = [batch("data_batch_1", 2), batch("data_batch_2", 4)]
    monkeypatch.setattr(original, "train_list", train)
    monkeypatch.setattr(original, "test_list", [batch("test_batch", 3)])
    _, checksum = write("batches.meta", {"label_names": ["thing"]})
    monkeypatch.setattr(original, "meta", {**original.meta, "md5": checksum})
    return tmp_path


@pytest.mark.parametrize("below", ["", "MNIST", "MNIST/raw"])
def test_the_digits_are_read_unchanged(
    below: str, mnist: Path, wanted: Wanted, read: Read
) -> None:
    before = sorted(mnist.rglob("*"))
    splits = open_source(mnist / below, wanted)
    assert splits.format == "MNIST"
    assert list(splits.sources) == list(COUNTS)
    for name, source in splits.sources.items():
        np.testing.assert_array_equal(read(source), noise(COUNTS[name], 28, 28))
        np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(source))), read(source))
    assert sorted(mnist.rglob("*")) == before


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_the_photographs_are_read_channel_last(
    below: str, cifar10: Path, wanted: Wanted, read: Read
) -> None:
    splits = open_source(cifar10 / below, wanted)
    assert splits.format == "CIFAR-10"
    # Row by row: all of red, then green, then blue.
    train, test = (
        np.concatenate([noise(count, 3072) for count in counts]).reshape(-1, 3, 32, 32)
        for counts in ((2, 4), (3,))
    )
    assert list(splits.sources) == list(COUNTS)
    np.testing.assert_array_equal(read(splits.sources["train"]), train.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(read(splits.sources["test"]), test.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte"])
@pytest.mark.parametrize(
    "content", [None, b"", b"\0\0\x08\x03", b"\0\0\x08\x01" + b"x" * 50, b"text"]
)
def test_damaged_digits_are_reported(
    content: bytes | None, file: str, mnist: Path, wanted: Wanted
) -> None:
    path = mnist / "MNIST" / "raw" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^'{mnist}' is damaged \(.+\); fetch it again$"):
        open_source(mnist, wanted)


def test_damaged_photographs_are_reported(cifar10: Path, wanted: Wanted) -> None:
    (cifar10 / "cifar-10-batches-py" / "test_batch").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"^'{cifar10}' is damaged \(.+\); fetch it again$"):
        open_source(cifar10, wanted)
