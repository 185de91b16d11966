"""Speed of loading prepared images, compared with decoding files in every epoch."""

import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from nvae_lightning.data import Image as ImageFormat
from nvae_lightning.data import ImageDataModule
from nvae_lightning.data.chunks import num_cores

PHOTOGRAPHS = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10_jpeg"
NUM_IMAGES, SIDE, BATCH, ROUNDS = 600, 256, 16, 3


def _write(folder: Path, suffix: str, **options: Any) -> None:
    """Write images in two classes: small photographs, enlarged, or noise."""
    files = sorted(PHOTOGRAPHS.rglob("*.jp*g"))
    random = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        if files:
            with Image.open(files[index * len(files) // NUM_IMAGES]) as photograph:
                small = photograph.convert("RGB")
        else:
            small = Image.fromarray(random.integers(256, size=(32, 32, 3), dtype=np.uint8))
        large = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
        pixels = large + random.normal(0, 4, large.shape)  # noise keeps PNGs large
        place = folder / f"class{index % 2}" / f"{index:04d}.{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place, **options)


def _rate(loader: Any) -> float:
    """Return the images per second over three epochs."""
    start, num_images = time.perf_counter(), 0
    for _ in range(3):
        for batch in loader:
            images = batch[0] if isinstance(batch, list) else batch
            num_images += len(images)
    assert num_images >= 3 * 0.8 * NUM_IMAGES
    return num_images / (time.perf_counter() - start)


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("jpg", {"quality": 90})])
def test_prepared_images_load_much_faster_than_files(
    tmp_path: Path, suffix: str, options: dict[str, Any]
) -> None:
    _write(tmp_path / "files", suffix, **options)

    def ours(num_workers: int | None) -> Any:
        data = ImageDataModule(
            root=tmp_path / "prepared", batch_size=BATCH, image=ImageFormat(3, SIDE, 8),
            num_workers=num_workers,
        )  # fmt: skip
        if not data.is_prepared:
            data.prepare(str(tmp_path / "files"))
        return data.train_dataloader()

    dataset = torchvision.datasets.ImageFolder(str(tmp_path / "files"), transforms.PILToTensor())
    loaders = {
        "default": ours(None),  # reads ahead in a thread
        "2 workers": ours(2),
        "ImageFolder, 2 workers": DataLoader(
            dataset, BATCH, shuffle=True, num_workers=2, persistent_workers=True
        ),
    }
    for loader in loaders.values():
        list(loader)  # starts its workers
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(ROUNDS):
        for name, loader in loaders.items():
            rates[name].append(_rate(loader))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians["default"] / medians["ImageFolder, 2 workers"]
    print(suffix, {name: round(rate) for name, rate in medians.items()}, f"ratio {ratio:.1f}")
    _record(suffix, rates, ratio)
    assert ratio >= 2  # 5 and more on an idle machine


def _record(suffix: str, rates: dict[str, list[float]], ratio: float) -> None:
    """Add the rates to the file named by LOADER_SPEED_JSON, if set."""
    if "LOADER_SPEED_JSON" not in os.environ:
        return
    path = Path(os.environ["LOADER_SPEED_JSON"])
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= {
        "what": f"images per second of {SIDE}x{SIDE} colour images in batches of {BATCH}",
        "machine": f"{num_cores()} cores, {platform.machine()}, torch {torch.__version__}",
        suffix: {
            "rates": {name: [round(rate) for rate in values] for name, values in rates.items()},
            "ratio of medians, default to ImageFolder": round(ratio, 1),
        },
    }
    path.write_text(json.dumps(known, indent=2) + "\n")
