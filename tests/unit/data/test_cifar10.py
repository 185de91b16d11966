import hashlib
import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torchvision

from nvae_lightning.data import CIFAR10
from nvae_lightning.data import Image as ImageFormat

SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "image": ImageFormat(3, 32, 8),
    "validation_fraction": 0.0,
}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Two training files of three images and a test file of two, in the published layout."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    checksums = {}

    def write(name: str, content: dict[str, object]) -> None:
        (folder / name).write_bytes(pickle.dumps(content))
        checksums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    written = {}
    for name, count in (("data_batch_1", 3), ("data_batch_2", 3), ("test_batch", 2)):
        # Row by row: all of red, then green, then blue.
        written[name] = np.random.default_rng(0).integers(256, size=(count, 3072), dtype=np.uint8)
        write(name, {"data": written[name], "labels": [0] * count})
    write("batches.meta", {"label_names": ["thing"]})

    original = torchvision.datasets.CIFAR10
    lists = {"train_list": ["data_batch_1", "data_batch_2"], "test_list": ["test_batch"]}
    for attribute, names in lists.items():
        monkeypatch.setattr(original, attribute, [[name, checksums[name]] for name in names])
    meta = {**original.meta, "md5": checksums["batches.meta"]}
    monkeypatch.setattr(original, "meta", meta)
    return written


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)


def test_the_published_files_are_read_channel_first(
    rows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    data = CIFAR10(root=tmp_path, **SETTINGS)
    data.prepare_data()
    data.setup("fit")
    train = np.concatenate([rows["data_batch_1"], rows["data_batch_2"]]).reshape(6, 3, 32, 32)
    assert np.array_equal(data.train_set.__getitems__(range(6)), train)
    test = rows["test_batch"].reshape(2, 3, 32, 32)
    assert np.array_equal(data.test_set.__getitems__(range(2)), test)


def test_a_prepared_folder_is_a_root(rows: dict[str, np.ndarray], tmp_path: Path) -> None:
    CIFAR10(root=tmp_path / "prepared", num_workers=0, **SETTINGS).prepare(str(tmp_path))
    data = CIFAR10(root=tmp_path / "prepared", **SETTINGS)
    data.prepare_data()
    data.setup("test")
    assert isinstance(data.test_set.images, np.memmap)
    test = rows["test_batch"].reshape(2, 3, 32, 32)
    assert np.array_equal(data.test_set.__getitems__(range(2)), test)


def test_a_failed_download_says_where_to_put_which_files(no_network: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^dataset\.root: no readable CIFAR-10 in ") as caught:
        CIFAR10(root=tmp_path, **SETTINGS).prepare_data()
    message = str(caught.value)
    assert str(tmp_path / "cifar-10-batches-py") in message
    assert "no network" in message
    assert "data_batch_1" in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"other"])
def test_a_damaged_file_is_reported(
    rows: dict[str, np.ndarray], no_network: None, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=r"^dataset\.root: no readable CIFAR-10 in "):
        CIFAR10(root=tmp_path, **SETTINGS).prepare_data()
