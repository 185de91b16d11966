import hashlib
import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision

from nvae_lightning.data import CIFAR10

SETTINGS: dict[str, Any] = {"batch_size": 4, "image_size": 32, "channels": 3, "bits": 8}


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


def test_the_published_files_are_read_channel_first(
    rows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    data = CIFAR10(root=tmp_path, **SETTINGS)
    data.prepare_data()
    data.setup("fit")
    train = np.concatenate([rows["data_batch_1"], rows["data_batch_2"]]).reshape(6, 3, 32, 32)
    assert torch.equal(data.train_set.images, torch.from_numpy(train))
    test = rows["test_batch"].reshape(2, 3, 32, 32)
    assert torch.equal(data.test_set.images, torch.from_numpy(test))


def test_a_failed_download_says_where_to_put_which_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)
    with pytest.raises(ValueError, match=r"^dataset\.root: no readable CIFAR-10 in ") as caught:
        CIFAR10(root=tmp_path, **SETTINGS).prepare_data()
    message = str(caught.value)
    assert str(tmp_path / "cifar-10-batches-py") in message
    assert "no network" in message
    assert "data_batch_1" in message
    assert "\n" not in message


def test_a_damaged_file_is_reported(rows: dict[str, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^dataset\.root: no readable CIFAR-10 in "):
        CIFAR10(root=tmp_path, **SETTINGS).load(train=False)
