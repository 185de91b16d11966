"""Every dataset trains from small files in its official layout; only the test reads test data."""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, Trainer
from PIL import Image
from torch.utils.data import TensorDataset

from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.data import (
    CIFAR10,
    FFHQ,
    MNIST,
    CelebA64,
    CelebAHQ,
    Datasets,
    ImageDataModule,
    ImageFolder,
    ImageNet32,
    MNIST5k,
    base,
)
from nvae_lightning.data import Image as ImageFormat
from nvae_lightning.model import NVAE
from nvae_lightning.training.module import NVAEModule

SMALL = ImageFormat(channels=3, size=8, bits=8)
NAMES = {
    MNIST5k: "mnist_5k", MNIST: "mnist", CIFAR10: "cifar10", ImageNet32: "imagenet32",
    CelebA64: "celeba64", CelebAHQ: "celeba_hq", FFHQ: "ffhq", ImageFolder: "image_folder",
}  # fmt: skip


def write_pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True)
    names = [f"{index:06d}.png" for index in range(count)]
    for index, name in enumerate(names):
        Image.new("RGB", (200, 220), (index, 2 * index, 99)).save(folder / name)
    return names


def write_files(kind: type[ImageDataModule], root: Path, patch: pytest.MonkeyPatch) -> None:
    """Write a few images in the dataset's published layout."""
    if kind is MNIST:
        raw = root / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for part, count in (("train", 12), ("t10k", 4)):
            for name, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
                header = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape)
                path = raw / f"{part}-{name}-ubyte"
                path.write_bytes(header + np.zeros(shape, np.uint8).tobytes())
    elif kind is CIFAR10:
        folder = root / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        checksums = {}
        for name, count in (("data_batch_1", 12), ("test_batch", 4), ("batches.meta", 0)):
            content = {"data": np.zeros((count, 3072), np.uint8), "labels": [0] * count}
            (folder / name).write_bytes(pickle.dumps({**content, "label_names": ["thing"]}))
            checksums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
        published = torchvision.datasets.CIFAR10
        for split, name in (("train_list", "data_batch_1"), ("test_list", "test_batch")):
            patch.setattr(published, split, [[name, checksums[name]]])
        patch.setattr(published, "meta", {**published.meta, "md5": checksums["batches.meta"]})
    elif kind is ImageNet32:
        write_pictures(root / "train_32x32", 12)
        write_pictures(root / "valid_32x32", 4)
    elif kind is CelebA64:
        names = write_pictures(root / "img_align_celeba", 20)
        lines = [f"{name} {min(index // 12 + index // 16, 2)}" for index, name in enumerate(names)]
        (root / "list_eval_partition.txt").write_text("\n".join(lines))
    elif kind is ImageFolder:
        for split, count in (("train", 12), ("test", 4)):
            write_pictures(root / split / "cats", count)
    elif kind is not MNIST5k:
        write_pictures(root, 16)


@pytest.mark.parametrize("kind", NAMES, ids=lambda kind: kind.__name__)
def test_a_dataset_trains_and_reads_no_test_image_before_the_test(
    kind: type[ImageDataModule],
    build_nvae: Callable[..., NVAE],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = None if kind is MNIST5k else tmp_path / "files"
    if root is not None:
        write_files(kind, root, monkeypatch)
    read: list[object] = []
    decode_all: Callable[..., Any] = base.decode_all

    def note(source: object, *arguments: Any) -> Any:
        read.append(source)
        return decode_all(source, *arguments)

    monkeypatch.setattr(base, "decode_all", note)
    data = kind(root, batch_size=4, image=SMALL, num_workers=0, check_counts=False)
    assert isinstance(data, LightningDataModule)
    module = NVAEModule(build_nvae())
    trainer = Trainer(accelerator="cpu", fast_dev_run=True, logger=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, data)
    assert "val/bpd" in trainer.callback_metrics
    test = data._sources.sources["test"]
    assert test not in read
    trainer.test(module, data, verbose=False)
    assert test in read
    assert torch.isfinite(trainer.callback_metrics["test/bpd"])


def test_a_prepared_test_split_is_not_mapped_before_the_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(ImageFolder, tmp_path / "files", monkeypatch)
    prepared = tmp_path / "prepared"
    ImageFolder(prepared, image=SMALL, num_workers=0).prepare(str(tmp_path / "files"))
    mapped: list[str] = []
    open_images: Callable[..., Any] = base.open_images

    def note(folder: Path, known: Any) -> Any:
        mapped.append(known.split)
        return open_images(folder, known)

    monkeypatch.setattr(base, "open_images", note)
    data = ImageFolder(prepared, batch_size=4, image=SMALL)
    data.prepare_data()
    data.setup("fit")
    assert mapped == ["train"]
    data.setup("test")
    assert mapped == ["train", "test"]


@pytest.mark.parametrize("kind", NAMES, ids=lambda kind: kind.__name__)
def test_config_and_class_have_the_same_defaults(kind: type[ImageDataModule]) -> None:
    with initialize_config_dir(str(CONFIG_ROOT / "conf"), version_base="1.3"):
        config = compose("train", [f"dataset={NAMES[kind]}"])
    configured = instantiate(config.dataset, _convert_="all")
    assert type(configured) is kind
    for name, value in vars(kind()).items():
        if not name.startswith("_"):
            assert getattr(configured, name) == value, name


@pytest.mark.parametrize("item", ["tensor", "floats", "picture", "array"])
def test_plain_datasets_are_a_data_module(item: str) -> None:
    pixels = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    images: Any = {
        "tensor": TensorDataset(pixels, torch.arange(20)),
        "floats": TensorDataset(pixels / 255),
        "picture": [(Image.new("RGB", (16, 16), (value,) * 3), value) for value in range(20)],
        "array": [np.full((8, 8, 3), value, np.uint8) for value in range(20)],
    }[item]
    data = Datasets(images, images, image=SMALL, batch_size=5, validation_fraction=0.25)
    data.prepare_data()
    data.setup("fit")
    assert data.validation_set is not None
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    assert sorted(torch.cat(batches)[:, 0, 0, 0].tolist()) == list(range(20))
    assert torch.cat(list(data.test_dataloader()))[:, 2, 7, 7].tolist() == list(range(20))
