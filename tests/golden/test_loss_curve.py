"""The loss of a short training, against the one committed beside this file.

A change that is not meant to change the computation leaves the curve alone. One that is meant to
is committed with the new curve: delete the file, run the test twice, and say why.
"""

import csv
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from nvae_lightning.cli import CONFIG_ROOT

GOLDEN = Path(__file__).with_name("mnist_5k-tiny.csv")
NAMES = ("train/loss", "train/elbo", "train/rate", "train/spectral", "train/grad_norm")


class Recorder(Callback):
    """Keep what is logged at each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.rows.append({name: float(trainer.callback_metrics[name]) for name in NAMES})


def _train(folder: Path) -> list[dict[str, float]]:
    with initialize_config_dir(str(CONFIG_ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["dataset.batch_size=8"])
    seed_everything(0)
    recorder = Recorder()
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, precision="64-true", max_steps=50,
        log_every_n_steps=1, callbacks=[recorder], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    datamodule = instantiate(config.dataset.datamodule)
    trainer.fit(instantiate(config.module, _convert_="all"), datamodule)
    return recorder.rows


def test_fifty_steps_follow_the_golden_curve(tmp_path: Path) -> None:
    rows = _train(tmp_path)
    assert len(rows) == 50
    if not GOLDEN.exists():
        with GOLDEN.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(NAMES)
            writer.writerows([row[name] for name in NAMES] for row in rows)
        pytest.fail(f"there was no golden curve; one has been written to {GOLDEN.name}")
    with GOLDEN.open() as file:
        golden = [{name: float(row[name]) for name in NAMES} for row in csv.DictReader(file)]
    for step, (row, expected) in enumerate(zip(rows, golden, strict=True)):
        assert row == pytest.approx(expected, rel=1e-6), f"step {step}"
    assert golden[-1]["train/elbo"] > golden[0]["train/elbo"]
