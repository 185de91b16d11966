"""Train on custom datasets: plain torch Datasets, and a YAML file with a recipe."""

from pathlib import Path

import yaml

from .conftest import Run

QUICK = (
    "model=tiny", "model.hierarchy.max_groups_per_scale=1", "logger=csv", "callbacks=none",
    "trainer.max_steps=1", "trainer.check_val_every_n_epoch=1", "num_importance_samples=1",
)  # fmt: skip
DATASET = """
_target_: nvae_lightning.data.Datasets
train:
  _target_: torchvision.datasets.FakeData
  size: 8
  image_size: [1, 8, 8]
test: ${.train}
batch_size: 4
seed: ${seed}
image:
  _target_: nvae_lightning.data.Image
  channels: 1
  size: 8
  bits: 8
"""
RECIPE = "epochs: 7\nnum_groups: [1]\ndownsample: 2\n"


def _run_folder(folder: Path) -> Path:
    [config] = folder.glob("outputs/*/*/config.yaml")
    return config.parent


def test_plain_torch_datasets_train(run_train: Run, tmp_path: Path) -> None:
    given = [
        setting
        for split in ("dataset.train", "dataset.test")
        for setting in (
            f"{split}._target_=torchvision.datasets.FakeData",
            f"+{split}.size=8",
            f"+{split}.image_size=[3,10,12]",  # resized and cropped to 8x8
        )
    ]
    result = run_train(
        "dataset=custom", "dataset.image.size=8", "dataset.batch_size=4", *given, *QUICK
    )
    assert result.returncode == 0, result.stderr
    metrics = (_run_folder(tmp_path) / "metrics.csv").read_text()
    assert "test/bpd" in metrics
    assert "val/bpd" in metrics


def test_a_dataset_file_brings_its_recipe(run_train: Run, tmp_path: Path) -> None:
    for name, text in (("dataset/noise", DATASET), ("recipe/published/noise", RECIPE)):
        path = tmp_path / f"conf/{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    result = run_train("--config-dir=conf", "dataset=noise", *QUICK)
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load((_run_folder(tmp_path) / "config.yaml").read_text())
    assert config["recipe"]["epochs"] == 7
