"""Averaged weights are evaluated beside the latest, and start a training on other images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from warm_python import run_python

pytestmark = pytest.mark.slow

QUICK = (
    "trainer=cpu", "logger=csv", "dataset.batch_size=8", "num_importance_samples=1",
    "trainer.limit_test_batches=1", "trainer.limit_val_batches=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with averaged weights."""
    place = tmp_path_factory.mktemp("run")
    arguments = (*QUICK, "callbacks=ema", "trainer.max_steps=3", "hydra.run.dir=run")
    result = run_python("-m", "nvae_lightning.train", *arguments, cwd=place)
    assert result.returncode == 0, result.stderr
    return place / "run"


def test_evaluation_reports_averaged_and_latest_weights(run: Path) -> None:
    arguments = (
        f"ckpt_path={run}", "num_importance_samples=1", "trainer.limit_test_batches=1",
        "hydra.run.dir=evaluation", "trainer=cpu",
    )  # fmt: skip
    result = run_python("-m", "nvae_lightning.evaluate", *arguments, cwd=run.parent)
    assert result.returncode == 0, result.stderr
    assert "these are the averaged weights; the latest: NLL" in result.stdout
    found = json.loads((run.parent / "evaluation" / "evaluation.json").read_text())
    assert found["latest"]["elbo_nats"] != found["elbo_nats"]


def test_a_training_on_other_images_starts_from_trained_weights(run: Path) -> None:
    place = run.parent
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        for split in ("train", "test"):
            path = place / "images" / split / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    arguments = (
        *QUICK, "dataset=image_folder", "dataset.root=images", "dataset.image.size=16",
        "dataset.image.channels=1", "dataset.image.bits=1", "dataset.validation_fraction=0",
        "model=pretrained", f"init_from={run}", "optimizer.lr=1e-9", "trainer.max_steps=1",
        "hydra.run.dir=tuned", "module.final_learning_rate=0",
    )  # fmt: skip
    result = run_python("-m", "nvae_lightning.train", *arguments, cwd=place)
    assert result.returncode == 0, result.stderr
    assert "decoder.initial_state" in result.stderr + result.stdout
    first = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    tuned = torch.load(place / "tuned" / "checkpoints" / "last.ckpt", weights_only=True)
    assert tuned["global_step"] == 1
    name = "model.encoder.groups.0.0.body.0.convolution.weight"
    torch.testing.assert_close(tuned["state_dict"][name], first[name], atol=1e-6, rtol=0)

    wrong = (*arguments, "model=base", "hydra.run.dir=wrong")
    result = run_python("-m", "nvae_lightning.train", *wrong, cwd=place)
    assert result.returncode == 1
    assert "choose model=pretrained" in result.stderr
